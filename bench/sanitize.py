"""A training step of small layers by backends with kernels, compared with float64: a short test, for compute-sanitizer.

Under compute-sanitizer run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own:
in the caching allocator's pool an access beyond a tensor would go unnoticed.

    compute-sanitizer python -m tcurlora_ext.bench.sanitize
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from .cases import Case, Layer, of_layer
from .devices import choose_device, synchronize
from .entry import run_command
from .names import kernel_variants
from .networks import build
from .reference import Reference
from .variants import Variant, prepare, variants

# No size is a multiple of a tile's; ranks with a specialised kernel and without; one tile of groups and several.
CASES = [
    of_layer(Layer(f"{s} slices", 72, 56, n, s), 67, rank=r, dtype=dtype, compiled=False)
    for r in (1, 2, 3, 6, 8, 12, 16)
    for s, n in ((1, 1), (12, 3))
    for dtype in ("float32", "bfloat16")
]


def step(case: Case, found: Sequence[Variant], device: torch.device) -> None:
    """A training step by each of these variants; RuntimeError where a result is wrong."""
    network = build(case, device)
    reference = Reference()
    for variant in found:
        problem = prepare(variant, case, network)
        reference.check(problem)
        problem.step()


def sanitize(
    variant: Annotated[
        list[str] | None, typer.Option(help="One of the backends' variants; may be given several times. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cuda",
) -> None:
    """Run a training step of small layers by backends that have kernels, and compare it with float64."""
    target = choose_device(device)
    known = {found.name: found for found in variants(target) if found.name in kernel_variants()}
    for name in variant or ():
        if name not in known:
            raise ValueError(
                f"--variant is '{name}', expected one that works on {device}: {', '.join(known) or 'none'}"
            )
    chosen = [known[name] for name in variant or known]
    for case in CASES:
        step(case, chosen, target)
    synchronize(target)
    typer.echo(f"{len(CASES)} layers by {', '.join(one.name for one in chosen)}: right")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(sanitize, arguments, "python -m tcurlora_ext.bench.sanitize")


if __name__ == "__main__":
    sys.exit(main())
