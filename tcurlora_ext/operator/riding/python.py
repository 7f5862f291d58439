"""The riding operators in Python, for installations without the C++ extension; csrc/riding is the same in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator.backends import BACKENDS, Backend
from tcurlora_ext.operator.backends.choice import Sizes, choose
from tcurlora_ext.operator.python import autocast, no_second_derivative, without_autocast

from . import products
from .arguments import SCHEMAS, split, split_backward


def define(library: torch.library.Library) -> None:
    """Define the operators in ``library`` and give them kernels, autograd and autocast."""
    for schema in SCHEMAS:
        library.define(schema)
    functions = (_riding_forward, _riding_backward, _ride_forward, _ride_backward)
    for name, function in zip(
        ("riding_forward", "riding_backward", "ride_forward", "ride_backward"), functions, strict=True
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
    library.impl("riding", lambda *given: torch.ops.tcurlora.riding_forward(*given)[0], "CompositeImplicitAutograd")
    library.impl("ride", lambda *given: torch.ops.tcurlora.ride_forward(*given)[0], "CompositeImplicitAutograd")
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        for name, cast in (("riding", (0, 1, 2, 5)), ("ride", (0, 3))):
            library.impl(name, autocast(getattr(torch.ops.tcurlora, name), device, cast), key)
            for pass_ in ("forward", "backward"):
                operator = getattr(torch.ops.tcurlora, f"{name}_{pass_}")
                library.impl(f"{name}_{pass_}", without_autocast(operator, device), key)
    for name, save, gradients in (("riding", _save_riding, _riding_gradients), ("ride", _save_ride, _ride_gradients)):
        torch.library.register_autograd(f"tcurlora::{name}_forward", gradients, setup_context=save, lib=library)
        torch.library.register_autograd(f"tcurlora::{name}_backward", no_second_derivative, lib=library)


def _riding_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    adapter, name = split(*rest)
    return products.forward(_backend_of(name, x, weight, adapter), x, weight, bias, adapter)


def _riding_backward(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    adapter, needs, name = split_backward(*rest)
    return products.backward(_backend_of(name, g, weight, adapter), g, x, h, weight, adapter, needs)


def _ride_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    adapter, name = split(*rest)
    return products.ride_forward(_backend_of(name, x, None, adapter), x, adapter)


def _ride_backward(g: Tensor, x: Tensor | None, h: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    adapter, needs, name = split_backward(*rest)
    return products.ride_backward(_backend_of(name, g, None, adapter), g, x, h, adapter, needs)


def _backend_of(name: str, rows: Tensor, weight: Tensor | None, adapter: Riding) -> Backend:
    core = adapter.core
    sizes = Sizes(
        tokens=rows.shape[:-1].numel(),
        width=max(core.shape[1:]) if core.dim() == 3 else 0,
        weight=0 if weight is None else weight.numel(),
    )
    return BACKENDS[choose(name, rows.device, rows.dtype, sizes).backend]


def _keep(ctx: Any, x: Tensor, h: Tensor, adapter: Sequence[Any], weight: Tensor | None, needs: list[bool]) -> None:
    """Save for backward: h for the core's gradient, x only for the row factor's."""
    needs_core, needs_row = needs[-2:]
    ctx.save_for_backward(x if needs_row else None, h if needs_core else None, weight, *adapter[:4])
    ctx.needs, ctx.options = needs, adapter[4:]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)


def _save_riding(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *adapter = inputs
    asked = ctx.needs_input_grad
    _keep(ctx, x, output[1], adapter, weight, [asked[0], asked[2], asked[4], asked[5]])


def _save_ride(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *adapter = inputs
    asked = ctx.needs_input_grad
    _keep(ctx, x, output[1], adapter, None, [asked[0], asked[2], asked[3]])


def _gradients(ctx: Any, g: Tensor) -> list[Tensor | None]:
    x, h, weight, *tensors = ctx.saved_tensors
    at, scale, *backend = ctx.options
    operator = torch.ops.tcurlora.ride_backward if weight is None else torch.ops.tcurlora.riding_backward
    base = () if weight is None else (weight,)
    found = operator(g, x, h, *base, *tensors, at, scale, ctx.needs, *backend)
    return [gradient if needed else None for gradient, needed in zip(found, ctx.needs, strict=True)]


def _riding_gradients(ctx: Any, g: Tensor | None, _h: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 10
    dx, dbias, dcore, drow = _gradients(ctx, g)
    return dx, None, dbias, None, dcore, drow, None, None, None, None


def _ride_gradients(ctx: Any, g: Tensor | None, _h: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    dx, dcore, drow = _gradients(ctx, g)
    return dx, None, dcore, drow, None, None, None, None
