"""The functional form of a TCUR layer.

Shapes of the folded factors (:mod:`tcurlora_ext.maths.folding`): ``col`` (out, c*S), ``core_fourier`` (S, c, r),
``row`` (r*S, in). A layer's weight is ``num_slices`` slices of the stack from ``first_slice`` on, stacked by rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors, Riding

from . import decomposition
from . import registration as _registration  # noqa: F401  registers torch.ops.tcurlora
from .riding import decomposition as riding_decomposition


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


def tcur_riding(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Riding, backend: str = "auto") -> Tensor:
    """``x' W^T + bias`` with the changed input ``x'[:, J] += scale * h (diag(gain) U)^T``, ``h = x R^T``.

    The form of an adapter whose C is columns of the frozen weight itself: ``torch.ops.tcurlora.riding``. It is
    differentiable once, with respect to x, bias, core and row. Under autocast it behaves as ``nn.Linear``.

    Args:
        x: (..., in); any leading shape.
        weight: (out, in), frozen, in the dtype of x.
        bias: (out,) in the dtype of x, or None.
        adapter: The adapter of the layer's slice, a :class:`tcurlora_ext.maths.contract.Riding`.
        backend: A name of :func:`tcurlora_ext.backends`, or ``"auto"``.

    Returns:
        (..., out) in the dtype of x, or in autocast's dtype where that is enabled.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, the slice is not in the core, the weight requires a gradient,
            or a name is unknown.
        RuntimeError: The backend that was asked for does not work on this device.
    """
    result: Tensor = torch.ops.tcurlora.riding.default(x, weight, bias, *adapter, backend)
    return result


def changed_input(x: Tensor, seen: Tensor | None, adapter: Riding, backend: str = "auto") -> Tensor:
    """The changed input x' of :func:`tcur_riding`, for a base that is called as a module: quantised, sharded or hooked.

    Args:
        x: (..., in), the base's input.
        seen: What the adapter sees in place of x, such as x with dropout, computed by PyTorch operations; None: x,
            computed by ``torch.ops.tcurlora.ride``.
        adapter: The adapter of the layer's slice.
        backend: A name of :func:`tcurlora_ext.backends`, or ``"auto"``; without effect with ``seen``.

    Returns:
        (..., in) in the dtype of x; with a zero core it equals x.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or a name is unknown.
    """
    if seen is not None:
        return riding_decomposition.changed(x, seen, adapter)
    result: Tensor = torch.ops.tcurlora.ride.default(x, *adapter, backend)
    return result
