"""One training step of small layers by every backend with kernels that works on the GPU, for compute-sanitizer.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own: in the caching allocator's
pool an access beyond a tensor would go unnoticed.

    compute-sanitizer python -m tcurlora_ext.bench.sanitize
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import typer

from .cases import Case, Layer, of_layer
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


def sanitize() -> None:
    """Run a training step of small layers on the GPU, by every backend that has kernels there."""
    device = torch.device("cuda")
    found = [variant for variant in variants(device) if variant.name in kernel_variants()]
    for case in CASES:
        step(case, found, device)
    torch.cuda.synchronize()
    typer.echo(f"{len(CASES)} layers by {', '.join(variant.name for variant in found)}: right")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command."""
    return run_command(sanitize, arguments, "python -m tcurlora_ext.bench.sanitize")


if __name__ == "__main__":
    sys.exit(main())
