"""The base's products around a backend's two steps. csrc/riding/riding.cpp is the same in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator.backends.base import Backend

from .arguments import check


def forward(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Riding) -> tuple[Tensor, Tensor]:
    """y (..., out) and h (T, r). Raises ValueError where the tensors do not fit together."""
    check(x, weight, bias, adapter)
    changed, h = backend.ride(_rows_of(x), adapter)
    y = torch.nn.functional.linear(changed, weight, bias)
    # Not a view to autograd, which lets no view of a custom function be changed in place later (ReLU(inplace=True)).
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]]), h


def backward(
    backend: Backend,
    g: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    adapter: Riding,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, bias, core, row), from g (..., out), h (T, r) and, where R trains, x (..., in)."""
    needs_x, needs_bias, needs_core, needs_row = needs
    g2 = _rows_of(g)
    dbias = g2.sum(0) if needs_bias else g.new_empty(0)
    dx, dcore, drow = g.new_empty(0), adapter.core.new_empty(0), g.new_empty(0)
    if needs_x:
        dx = g2 @ weight
        dcore, drow = backend.ride_back(dx, _optional_rows(x), h, adapter, (needs_x, needs_core, needs_row))
        dx = torch.ops.aten._unsafe_view(dx, [*g.shape[:-1], weight.shape[1]])
    elif needs_core or needs_row:
        # Only the chosen features of g W are needed, as before a network's first adapted layer.
        p = g2 @ weight.index_select(1, adapter.columns)
        alone = adapter._replace(columns=torch.arange(p.shape[1], device=p.device))
        dcore, drow = backend.ride_back(p, _optional_rows(x), h, alone, (needs_x, needs_core, needs_row))
    return dx, dbias, dcore, drow


def ride_forward(backend: Backend, x: Tensor, adapter: Riding) -> tuple[Tensor, Tensor]:
    """x' (..., in) and h (T, r). Raises ValueError where the tensors do not fit together."""
    check(x, None, None, adapter)
    changed, h = backend.ride(_rows_of(x), adapter)
    return torch.ops.aten._unsafe_view(changed, x.shape), h


def ride_backward(
    backend: Backend, g: Tensor, x: Tensor | None, h: Tensor | None, adapter: Riding, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, core, row), from the gradient g (..., in) of x'."""
    dx = _rows_of(g).clone(memory_format=torch.contiguous_format)
    dcore, drow = backend.ride_back(dx, _optional_rows(x), h, adapter, needs)
    return torch.ops.aten._unsafe_view(dx, g.shape) if needs[0] else g.new_empty(0), dcore, drow


def _rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _optional_rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _rows_of(tensor)
