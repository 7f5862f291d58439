"""Compares random layers with the dense definition in float64: the output and all six gradients, on every backend.

    python tests/soak/random_layers.py 1000 0      # number of layers, seed

Drawn at random: sizes, ranks, slices, the first slice and how many a fused layer has, transform, dtype, bias, scale,
the batch's shape (also empty and without leading dimensions), and strides of every tensor. Tolerances are those of
tests/operator/test_accuracy.py; the eager form, with which it compares shorter dtypes, has a bound of its own here.
The first failures are printed; the exit code is 1 where there are any.
"""

from __future__ import annotations

import argparse
import random
import runpy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.operator.backends import missing

OPERATOR = Path(__file__).parents[1] / "operator"
build = runpy.run_path(str(OPERATOR / "conftest.py"))["build"]
definition_of = runpy.run_path(str(OPERATOR / "test_accuracy.py"))["definition_of"]

NAMES = ("x", "weight", "bias", "col", "core", "row")
# Triton's kernels have no CPU form but their interpreter, which tests/kernels runs.
BACKENDS = [name for name in ("eager", "native") if not missing(name, "cpu")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT64 = 1e-12  # of the largest entry
EAGER = 8  # eps of the dtype, in the Frobenius norm: h, its product with the cores and y are rounded, and sums of them
FEW = 16  # numbers in a tensor: of fewer, eager may be exact by chance, and EAGER bounds the other backends too
SHOWN = 10


def with_strides(t: Tensor | None, draw: random.Random) -> Tensor | None:
    """The same values with other strides: contiguous, transposed in memory, every other element, or an offset."""
    if t is None or draw.random() < 0.4:
        return t
    kind = draw.choice(["transposed", "every other", "offset"])
    if kind == "transposed":
        return t.mT.contiguous().mT if t.dim() >= 2 else t
    if kind == "every other":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return torch.cat([torch.full_like(t.flatten()[:1], float("nan")), t.flatten()])[1:].view(t.shape)


def random_case(draw: random.Random) -> tuple[Any, str]:
    """A call of the operator, and a line that describes it."""
    S = draw.choice([1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 24, 36])
    n = draw.randint(1, min(S, 4))
    options: dict[str, Any] = {
        "S": S, "n": n, "first": draw.randint(0, S - n), "out": draw.randint(1, 40), "in_": draw.randint(1, 40),
        "c": draw.randint(1, 17), "r": draw.randint(1, 17), "bias": draw.random() < 0.6,
        "leading": draw.choice([(), (0,), (1,), (5,), (33,), (130,), (2, 3), (3, 0, 2), (2, 1, 5), (2, 2, 2, 3)]),
        "transform": draw.choice(["dft", "dct"]), "scale": draw.choice([0.02, 0.3, -0.1]),
        "seed": draw.randrange(2**31),
    }  # fmt: skip
    dtype = draw.choice(DTYPES)
    case = build(**options).to(dtype, torch.promote_types(dtype, torch.float32))
    return case.replaced(**{name: with_strides(getattr(case, name), draw) for name in NAMES}), f"{dtype} {options}"


def results_of(case: Any, g: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of all tensors, which keep their strides."""
    leaves = {name: t.detach().requires_grad_() for name in NAMES if (t := getattr(case, name)) is not None}
    case = case.replaced(**leaves)
    y = torch.ops.tcurlora.linear(*case.arguments)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True))}


def definition(case: Any, g: Tensor) -> dict[str, Tensor]:
    """The same by the dense definition in float64. A layer without bias has one of zeros there."""
    whole = case if case.bias is not None else case.replaced(bias=torch.zeros(case.weight.shape[0]))
    found: dict[str, Tensor] = definition_of(whole, g)
    return {name: t for name, t in found.items() if name == "y" or getattr(case, name) is not None}


def error_of(found: Tensor, expected: Tensor) -> float:
    """The error relative to the largest entry in float64, in the Frobenius norm otherwise; 0 for zeros that are met."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    difference = found.double() - expected
    ours, size = (
        (difference.abs().max(), expected.abs().max())
        if found.dtype == torch.float64
        else (difference.norm(), expected.norm())
    )
    return float(ours / size) if size > 0 else float(ours)


def wrong(case: Any, g: Tensor) -> tuple[list[str], dict[str, float]]:
    """What exceeds its tolerance, and the largest error of each backend in eps of the layer's dtype."""
    expected, eager = definition(case, g), results_of(case.replaced(backend="eager"), g)
    lines, largest = [], dict.fromkeys(BACKENDS, 0.0)
    for backend in BACKENDS:
        found = eager if backend == "eager" else results_of(case.replaced(backend=backend), g)
        for name, right in expected.items():
            eps = torch.finfo(found[name].dtype).eps
            error = error_of(found[name], right)
            largest[backend] = max(largest[backend], error / torch.finfo(case.x.dtype).eps)
            if found[name].dtype == torch.float64:
                bound = FLOAT64
            elif backend == "eager" or right.numel() < FEW:
                bound = EAGER * torch.finfo(case.x.dtype).eps
            else:
                bound = 2 * error_of(eager[name], right) + eps
            if not error <= bound or found[name].dtype != eager[name].dtype:
                lines.append(f"{backend}, {name}: error {error:.1e}, expected at most {bound:.1e}")
    return lines, largest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, metavar="N", help="how many layers")
    parser.add_argument("seed", type=int, metavar="SEED")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    counts, failures = Counter[str](), []
    largest: dict[str, float] = {}
    for number in range(options.count):
        case, description = random_case(draw)
        generator = torch.Generator().manual_seed(number)
        g = torch.randn(*case.x.shape[:-1], case.weight.shape[0], generator=generator, dtype=torch.float64)
        lines, errors = wrong(case, g.to(case.x.dtype))
        failures += [f"layer {number}, {line}; {description}" for line in lines]
        name = str(case.x.dtype).removeprefix("torch.")
        counts[name] += 1
        for backend, error in errors.items():
            largest[f"{backend} {name}"] = max(largest.get(f"{backend} {name}", 0.0), error)
    print(*failures[:SHOWN], sep="\n", end="\n" if failures else "")
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    errors_ = ", ".join(f"{key} {value:.1f}" for key, value in sorted(largest.items()))
    print(f"{options.count} layers ({kinds}): {len(failures)} failures; largest error in eps: {errors_}")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
