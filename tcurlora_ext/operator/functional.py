"""The functional form of a TCUR layer.

Shapes of the folded factors (:mod:`tcurlora_ext.maths.folding`): ``col`` (out, c*S), ``core_fourier`` (S, c, r),
``row`` (r*S, in). A layer's weight is ``num_slices`` slices of the stack from ``first_slice`` on, stacked by rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors

from . import decomposition
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
    """``x W^T + bias + scale * m col^T`` with ``h = x row^T`` and ``m = h B_l^T``: ``torch.ops.tcurlora.linear``.

    Tensors are float64, float32, bfloat16 or float16. Under autocast it behaves as ``nn.Linear``. It is differentiable
    once, with respect to every tensor: a second derivative raises RuntimeError.

    Args:
        x: (..., in); any leading shape. It may be empty or not contiguous.
        weight: (num_slices*out, in), in the dtype of x.
        bias: (num_slices*out,) in the dtype of x, or None.
        col: (out, c*S), in the dtype of x.
        core_fourier: (S, c, r), in any floating dtype, such as float32 with a bfloat16 x.
        row: (r*S, in), in the dtype of x.
        first_slice: The layer's first slice, from 0.
        num_slices: How many slices the layer has.
        scale: Multiplies the delta ``m col^T``.
        backend: A name of :func:`tcurlora_ext.backends`, or ``"auto"``.
        transform: ``"dft"`` or ``"dct"``: the transform by which col, row and the core are folded.

    Returns:
        (..., num_slices*out) in the dtype of x, or in autocast's dtype where that is enabled.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, a slice is not in the core, or a name is unknown.
        RuntimeError: The backend that was asked for does not work on this device.
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
    """The delta of :func:`tcurlora_ext.functional.tcur_linear` alone, ``scale * m col^T``.

    It serves an adapter whose x differs from the base's, as with dropout. It uses PyTorch operations for every backend,
    and autograd and autocast treat it as such; autograd saves h for the core's gradient.

    Args:
        x: (..., in).
        col: (out, c*S), in the dtype of x.
        core_fourier: (S, c, r), in any floating dtype.
        row: (r*S, in), in the dtype of x.
        first_slice: The layer's first slice, from 0.
        num_slices: How many slices the layer has.
        scale: Multiplies the result.
        transform: ``"dft"`` or ``"dct"``.

    Returns:
        (..., num_slices*out) in the dtype of x, or in autocast's dtype where that is enabled.

    Raises:
        ValueError: A slice is not in the core, or the transform is unknown.
        RuntimeError: Shapes, dtypes or devices do not fit; PyTorch's matrix products raise it.
    """
    return decomposition.delta(x, Factors(col, core_fourier, row, first_slice, num_slices, scale, transform))
