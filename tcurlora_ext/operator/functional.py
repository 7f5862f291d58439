"""The functional form of a TCUR layer."""

from __future__ import annotations

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors

from . import plain
from . import registration as _registration  # noqa: F401  registers torch.ops.tcurlora


def tcur_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    col: Tensor,
    core_fourier: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    backend: str = "auto",
    transform: str = "dft",
) -> Tensor:
    """``x W^T + bias + scale * m col^T`` with ``h = x row^T`` and ``m = h B_l^T``, in the folding of docs/maths.md.

    x (..., in); weight (num_slices*out, in): slices first_slice, first_slice+1, ... stacked by rows; bias
    (num_slices*out,) or None; col (out, c*S); core_fourier (S, c, r); row (r*S, in). Result (..., num_slices*out) in
    the dtype of x, which weight, bias, col and row share (float64, float32, bfloat16, float16); the core may be wider.
    Under autocast it behaves as ``nn.Linear``. Gradients reach every tensor that asks for one.

    ``transform`` is "dft" or "dct" (the folding that col, row and the core are in), ``backend`` a name of
    :func:`tcurlora_ext.backends`. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    return torch.ops.tcurlora.linear.default(
        x, weight, bias, col, core_fourier, row, first_slice, num_slices, scale, transform, backend
    )


def tcur_delta(
    x: Tensor,
    col: Tensor,
    core_fourier: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    transform: str = "dft",
) -> Tensor:
    """``scale * m col^T`` of :func:`tcur_linear` alone: (..., in) -> (..., num_slices*out).

    For an adapter that reads another x than the base does, as with dropout. PyTorch operations whatever the backend,
    under autograd and autocast like any others; h is kept for the core's gradient.
    """
    return plain.delta(x, Factors(col, core_fourier, row, first_slice, num_slices, scale, transform))
