"""``torch.ops.tcurlora`` in Python, for installations without the C++ extension.

It has schemas, autograd, autocast and the choice of a backend; csrc/operator.cpp and csrc/autograd.cpp are the same in
C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Gradients

from .arguments import backward_arguments, backward_schema, forward_arguments, forward_schema
from .backends import BACKENDS, Backend
from .backends.choice import Sizes, choose


def define(library: torch.library.Library) -> None:
    """Define the operators in ``library`` and give them kernels, autograd and autocast."""
    library.define(forward_schema("linear", result="Tensor"))
    library.define(forward_schema("forward"))
    library.define(backward_schema("backward"))
    library.impl("linear", _linear, "CompositeImplicitAutograd")
    library.impl("forward", _forward, "CompositeExplicitAutograd")
    library.impl("backward", _backward, "CompositeExplicitAutograd")
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        # x, weight, bias, col and row; the core keeps its dtype.
        library.impl("linear", autocast(torch.ops.tcurlora.linear, device, (0, 1, 2, 3, 5)), key)
        library.impl("forward", without_autocast(torch.ops.tcurlora.forward, device), key)
        library.impl("backward", without_autocast(torch.ops.tcurlora.backward, device), key)
    torch.library.register_autograd("tcurlora::forward", _gradients, setup_context=_save, lib=library)
    torch.library.register_autograd("tcurlora::backward", no_second_derivative, lib=library)


def _linear(*arguments: Any) -> Tensor:
    return torch.ops.tcurlora.forward(*arguments)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    factors, backend = forward_arguments(*rest)
    return _backend_of(backend, x, weight, factors.core).forward(x, weight, bias, factors)


def _backward(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> Gradients:
    factors, needs, backend = backward_arguments(*rest)
    return _backend_of(backend, g, weight, factors.core).backward(g, x, h, weight, factors, needs)


def _backend_of(name: str, rows: Tensor, weight: Tensor, core: Tensor) -> Backend:
    sizes = Sizes(
        tokens=rows.shape[:-1].numel(),
        width=core.shape[0] * max(core.shape[1:]) if core.dim() == 3 else 0,
        weight=weight.numel(),
    )
    return BACKENDS[choose(name, rows.device, rows.dtype, sizes).backend]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, col, core, row, *rest = inputs
    needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row = ctx.needs_input_grad[:6]
    h = output[1]
    # h has T*r*S elements, x has T*in. Either suffices for the gradients of core and col, so the smaller one is saved.
    prefers_x = row.shape[0] > row.shape[1]
    needs_h = needs_core or needs_col
    saves_x = needs_weight or needs_row or (needs_h and prefers_x)
    saves_h = needs_h and not prefers_x
    ctx.save_for_backward(x if saves_x else None, h if saves_h else None, weight, col, core, row)
    ctx.needs = [needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row]
    ctx.factors, ctx.options = rest[:3], rest[3:]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, g: Tensor | None, _h: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    x, h, weight, col, core, row = ctx.saved_tensors
    gradients = torch.ops.tcurlora.backward(g, x, h, weight, col, core, row, *ctx.factors, ctx.needs, *ctx.options)
    asked = [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs, strict=True)]
    return (*asked, None, None, None, None, None)


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise RuntimeError("tcurlora::backward has no derivative: a second derivative is not implemented")


def autocast(operator: Any, device_type: str, cast: tuple[int, ...]) -> Any:
    """Cast as nn.Linear does: the floating arguments at ``cast``, other than float64, to the autocast dtype."""

    def call(*arguments: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def lowered(tensor: Tensor | None) -> Tensor | None:
            lower = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if lower and tensor is not None else tensor

        with torch.amp.autocast(device_type, enabled=False):
            result: Tensor = operator(*(lowered(a) if i in cast else a for i, a in enumerate(arguments)))
            return result

    return call


def without_autocast(operator: Any, device_type: str) -> Any:
    """Call the operator with autocast off: its arguments are already cast, also in a backward pass under autocast."""

    def call(*arguments: Any) -> Any:
        with torch.amp.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call
