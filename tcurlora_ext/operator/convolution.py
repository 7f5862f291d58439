"""A convolution with a t-CUR adapter: forward and backward without a tensor of the size of the weight.

The weight is a matrix, whose rows are kernels on the input (docs/convolutions.md). With N samples, x (N, in, ...) and
y (N, out, ...), ``*`` for the layer's convolution and @ for a 1x1 convolution, a product along the channels:

    convolution   weight (out, in, k...)    h = down * x        y = weight * x + bias + mix @ h
    transposed    weight (in, out, k...)    h = down @ x        y = weight * x + bias + up * (mix @ h)

    backward      p = g, or the transposed layer's adjoint of ``up`` on g      dmix = p h^T      dh = mix^T p

``down`` is R folded, q kernels; ``up`` is C folded, for a convolution already in ``mix``. A frozen convolution of
PyTorch keeps x for its backward pass, because its weight might train. Here h is kept in place of x where it is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.grouped import GroupedMiddle
from tcurlora_ext.maths.middle import BatchedMiddle
from tcurlora_ext.trace import stage as traced

Grads = tuple[Tensor | None, ...]


class Geometry(NamedTuple):
    """How a convolution moves over its input; each list has a number for each dimension of space."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]


class Kernels(NamedTuple):
    """The adapter of one layer as kernels.

    Attributes:
        down: R of the stack, folded: (q, in, k...) of a convolution, (q, in) of a transposed one.
        mix: ``scale * col B_l`` (out, q) of a convolution, ``scale * B_l`` (q_c, q) of a transposed one.
        up: C of the stack, folded, of a transposed convolution: (q_c, out, k...); None of a convolution.
    """

    down: Tensor
    mix: Tensor
    up: Tensor | None


def kernels_of(
    call: Factors, shape: Sequence[int], transposed: bool, phases: tuple[Tensor, ...] | None = None
) -> Kernels:
    """The kernels of a layer of one slice; differentiable with respect to col, core and row.

    Args:
        call: The call of the operator for this slice.
        shape: That of the layer's weight.
        transposed: Whether the convolution is a transposed one.
        phases: As for :class:`BatchedMiddle`, where the graph holds them.
    """
    col, core, row = call.col, call.core, call.row
    if not transposed:
        return Kernels(row.reshape(-1, *shape[1:]), _mixed(call, col.to(core.dtype), phases).to(col.dtype), None)
    unit = torch.eye(col.shape[1], dtype=core.dtype, device=core.device)
    return Kernels(row, _mixed(call, unit, phases).to(col.dtype), col.T.reshape(-1, *shape[1:]))


def _mixed(call: Factors, left: Tensor, phases: tuple[Tensor, ...] | None) -> Tensor:
    """``scale * left B_l``: (n, c*S) -> (n, r*S)."""
    if phases is None:
        middle = GroupedMiddle(call, left.dtype)
        return middle.backward(middle.by_group(left.unsqueeze(1)), left.dtype)
    unit = torch.eye(call.row.shape[0], dtype=left.dtype, device=left.device)
    return left @ BatchedMiddle(call, left.dtype, phases).forward(unit).squeeze(1).T


def convolved(
    x: Tensor, seen: Tensor | None, weight: Tensor | None, bias: Tensor | None, kernels: Kernels, geometry: Geometry
) -> Tensor:
    """The convolution of x with its adapter. Under autocast it behaves as PyTorch's convolutions do.

    It is differentiable once, with respect to every tensor.

    Args:
        x: (N, in, ...), in the dtype of the weight, or in any under autocast.
        seen: What the adapter sees in place of x, such as x with dropout; None: x.
        weight: The layer's weight as it stores it; one group. None: the result is the adapter's part alone.
        bias: (out,) or None.
        kernels: The adapter, in the dtype of the weight.
        geometry: Stride, padding and dilation.

    Returns:
        (N, out, ...).

    Raises:
        RuntimeError: Shapes, dtypes or devices do not fit, as for PyTorch's convolutions.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return composed(x, seen, weight, bias, kernels, geometry)
    given = _cast(x.device.type, x, seen, weight, bias, *kernels)
    with torch.amp.autocast(x.device.type, enabled=False):
        result: Tensor = _Convolved.apply(*given, geometry)[0]
    return result


def composed(
    x: Tensor, seen: Tensor | None, weight: Tensor | None, bias: Tensor | None, kernels: Kernels, geometry: Geometry
) -> Tensor:
    """As :func:`convolved`, in PyTorch operations alone: for exporters, and for the transforms of torch.func."""
    x, seen, weight, bias, down, mix, up = _cast(x.device.type, x, seen, weight, bias, *kernels)
    adapter_x = x if seen is None else seen
    h = _pointwise(down, adapter_x) if geometry.transposed else _convolution(adapter_x, down, None, geometry)
    delta = _delta(h, mix, up, geometry)
    return delta if weight is None else _convolution(x, weight, bias, geometry) + delta


def _cast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors in autocast's dtype where it is enabled; float64 stays, as in PyTorch's convolutions."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return torch.convolution(x, weight, bias, *geometry, groups=1)


def _pointwise(matrix: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution: (m, n), (N, n, ...) -> (N, m, ...).

    It is not torch.matmul, whose order of sums depends on which of its arguments require gradients.
    """
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape[0], matrix.shape[0], *x.shape[2:])


def _delta(h: Tensor, mix: Tensor, up: Tensor | None, geometry: Geometry) -> Tensor:
    z = _pointwise(mix, h)
    return z if up is None else _convolution(z, up, None, geometry)


def _gradient_of_input(g: Tensor, shape: Sequence[int], weight: Tensor, geometry: Geometry) -> Tensor:
    unread = g.new_empty(1).expand(shape)  # x, of which this gradient takes the shape alone
    return torch.ops.aten.convolution_backward(g, unread, weight, None, *geometry, 1, [True, False, False])[0]


def _gradient_of_weight(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, 1, [False, True, False])[1]


def stage(name: str) -> AbstractContextManager[Any]:
    """The stage of a profile, which a compiled graph does not have."""
    return nullcontext() if torch.compiler.is_compiling() else traced(name)


def _products(g: Tensor, x: Tensor) -> Tensor:
    """The sum over samples and space of the products of channels, ``g x^T``: (m, n), over samples in float32."""
    wide = torch.promote_types(g.dtype, torch.float32)
    return torch.bmm(g.flatten(2), x.flatten(2).mT).sum(0, dtype=wide).to(g.dtype)


class _Convolved(torch.autograd.Function):
    """:func:`convolved` -> (y, h). h is not differentiable."""

    @staticmethod
    def forward(
        x: Tensor,
        seen: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        mix: Tensor,
        up: Tensor | None,
        geometry: Geometry,
    ) -> tuple[Tensor, Tensor]:
        adapter_x = x if seen is None else seen
        with stage("h = x row^T"):
            h = _pointwise(down, adapter_x) if up is not None else _convolution(adapter_x, down, None, geometry)
        if weight is None:
            return _delta(h, mix, up, geometry), h
        with stage("y = x W^T + bias"):
            y = _convolution(x, weight, bias, geometry)
        # Delta is added to the base in place: with a zero core, y is that of the base bit for bit.
        with stage("y += m col^T"):
            if up is None:
                # A view, or an error: what a copy got would be lost.
                y.view(*y.shape[:2], prod(y.shape[2:])).baddbmm_(mix.expand(y.shape[0], -1, -1), h.flatten(2))
            else:
                y += _delta(h, mix, up, geometry)
        return y, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, seen, weight, _, down, mix, up, ctx.geometry = inputs
        needs_x, needs_seen, needs_weight, needs_bias, needs_down, needs_mix, needs_up, _ = ctx.needs_input_grad
        adapter_x, h = (x if seen is None else seen), output[1]
        needs_h = needs_mix or needs_up
        # h is made again from x where that is smaller, or kept in any case.
        keeps_h = needs_h and not (needs_down or h.numel() > adapter_x.numel())
        keeps_seen = needs_down or (needs_h and not keeps_h)
        ctx.save_for_backward(
            x if needs_weight or (keeps_seen and seen is None) else None,
            seen if keeps_seen else None,
            h if keeps_h else None,
            weight, down, mix, up,
        )  # fmt: skip
        ctx.needs = (needs_x, needs_seen, needs_weight, needs_bias, needs_down, needs_mix, needs_up)
        ctx.shape, ctx.has_seen = x.shape, seen is not None
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, _h: Tensor | None) -> Grads:
        if g is None:
            return (None,) * 8
        with torch.amp.autocast(g.device.type, enabled=False):
            return (*_backward(ctx, g), None)


def _backward(ctx: Any, g: Tensor) -> Grads:
    x, seen, h, weight, down, mix, up = ctx.saved_tensors
    needs_x, needs_seen, needs_weight, needs_bias, needs_down, needs_mix, needs_up = ctx.needs
    geometry, transposed = ctx.geometry, up is not None
    adapter_x = seen if ctx.has_seen else x
    needs_dh = needs_down or (needs_seen if ctx.has_seen else needs_x)
    dx = dseen = dweight = dbias = ddown = dmix = dup = None
    if h is None and (needs_mix or needs_up):
        with stage("h = x row^T"):
            h = _pointwise(down, adapter_x) if transposed else _convolution(adapter_x, down, None, geometry)
    p = g
    if transposed and (needs_mix or needs_dh):
        with stage("p = g col"):
            shape = (g.shape[0], up.shape[0], *ctx.shape[2:])
            p = _gradient_of_input(g, shape, up, geometry)
    if needs_mix:
        with stage("dcore = diag(p^T h)"):
            dmix = _products(p, h)
    if needs_up:
        dup = _gradient_of_weight(g, _pointwise(mix, h), up, geometry)
    if needs_weight:
        dweight = _gradient_of_weight(g, x, weight, geometry)
    if needs_bias:
        dbias = g.sum((0, *range(2, g.dim())))
    if needs_dh:
        with stage("dh = p B"):
            dh = _pointwise(mix.T, p)
        with stage("dx = g W + dh row"):
            if needs_down:
                ddown = _products(dh, adapter_x) if transposed else _gradient_of_weight(dh, adapter_x, down, geometry)
            if needs_seen if ctx.has_seen else needs_x:
                inner = _pointwise(down.T, dh) if transposed else _gradient_of_input(dh, ctx.shape, down, geometry)
                if ctx.has_seen:
                    dseen = inner
                else:
                    dx = inner if weight is None else inner.add_(_gradient_of_input(g, ctx.shape, weight, geometry))
    if needs_x and dx is None and weight is not None:
        dx = _gradient_of_input(g, ctx.shape, weight, geometry)
    return dx, dseen, dweight, dbias, ddown, dmix, dup
