"""The functional form of a TCUR layer.

Shapes, in the folding of :mod:`tcurlora_ext.maths.folding`: ``col`` (out, c*S), ``core_fourier`` (S, c, r), ``row``
(r*S, in). A layer has ``num_slices`` slices of the stack from ``first_slice`` on, stacked by rows.
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

    Tensors are float64, float32, bfloat16 or float16. Under autocast it behaves as ``nn.Linear``. Gradients reach every
    tensor that asks for one; a second derivative is refused.

    Args:
        x: (..., in); any leading shape, also empty or not contiguous.
        weight: (num_slices*out, in), in the dtype of x.
        bias: (num_slices*out,) in the dtype of x, or None.
        col: (out, c*S), in the dtype of x.
        core_fourier: (S, c, r), in any floating dtype, such as float32 beside a bfloat16 x.
        row: (r*S, in), in the dtype of x.
        first_slice: The layer's first slice, from 0.
        num_slices: How many slices it has.
        scale: Multiplies the adapter's part.
        backend: A name of :func:`tcurlora_ext.backends`, or ``"auto"``.
        transform: ``"dft"`` or ``"dct"``: the folding that col, row and the core are in.

    Returns:
        (..., num_slices*out) in the dtype of x; under autocast in its dtype.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, slices are not in the core, or a name is unknown.
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
    """The adapter's part of :func:`tcurlora_ext.functional.tcur_linear` alone, ``scale * m col^T``.

    For an adapter that reads another x than the base does, as with dropout. PyTorch operations whatever the backend,
    under autograd and autocast like any others; h is kept for the core's gradient.

    Args:
        x: (..., in).
        col: (out, c*S), in the dtype of x.
        core_fourier: (S, c, r), in any floating dtype.
        row: (r*S, in), in the dtype of x.
        first_slice: The layer's first slice, from 0.
        num_slices: How many slices it has.
        scale: Multiplies the result.
        transform: ``"dft"`` or ``"dct"``.

    Returns:
        (..., num_slices*out) in the dtype of x; under autocast in its dtype.

    Raises:
        ValueError: Slices are not in the core, or the transform is unknown.
        RuntimeError: Shapes, dtypes or devices do not fit, as PyTorch's products say.
    """
    return decomposition.delta(x, Factors(col, core_fourier, row, first_slice, num_slices, scale, transform))
