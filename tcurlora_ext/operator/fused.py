"""The Triton kernels as an implementation of the operators: arguments as in eager.py, checked before any kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import eager


def _kernels() -> Any:
    # Imported when first used: it needs the package triton.
    from tcurlora_ext.kernels import operator

    return operator


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    col: Tensor,
    core: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    transform: str,
) -> tuple[Tensor, Tensor]:
    """y (..., n*out) and h (T, r*S). Raises ValueError where the tensors do not fit together."""
    eager.check(x, weight, bias, col, core, row, num_slices)
    eager.check_slices(core.shape[0], first_slice, num_slices)
    return _kernels().forward(x, weight, bias, col, core, row, first_slice, num_slices, scale, transform)


def backward(
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    col: Tensor,
    core: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    needs: list[bool],
    transform: str,
) -> eager.Gradients:
    """Gradients of (x, weight, bias, col, core, row); an empty tensor where ``needs`` says no."""
    return _kernels().backward(g, x, h, weight, col, core, row, first_slice, num_slices, scale, needs, transform)
