"""The operators ``torch.ops.tcurlora.*``: schemas, shape-only fakes, autograd, autocast.

``linear``    the differentiable one: y only.
``forward``   -> (y, h); differentiable with respect to every tensor, h is not.
``backward``  -> (dx, dweight, dbias, dcol, dcore, drow), an empty tensor where ``needs`` says no.

``backend`` names the implementation ("auto", "eager"). For the core's gradient the smaller of h and x is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import eager
from .backends import resolve

_FACTORS = "Tensor col, Tensor core, Tensor row, int first_slice, int num_slices, float scale"
_OPTIONS = 'str transform="dft", str backend="auto"'

_library = torch.library.Library("tcurlora", "DEF")
_library.define(f"linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_OPTIONS}) -> Tensor")
_library.define(f"forward(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_OPTIONS}) -> (Tensor y, Tensor h)")
_library.define(
    f"backward(Tensor g, Tensor? x, Tensor? h, Tensor weight, {_FACTORS}, bool[6] needs, {_OPTIONS})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dcol, Tensor dcore, Tensor drow)"
)


def _linear(*arguments: Any) -> Tensor:
    return torch.ops.tcurlora.forward(*arguments)[0]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    col: Tensor,
    core: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    transform: str = "dft",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    resolve(backend)
    eager.check(x, weight, bias, col, core, row, num_slices)
    eager.check_slices(core.shape[0], first_slice, num_slices)
    return eager.forward(x, weight, bias, col, core, row, first_slice, num_slices, scale, transform)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    col: Tensor,
    core: Tensor,
    row: Tensor,
    first_slice: int,
    num_slices: int,
    scale: float,
    transform: str = "dft",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    eager.check(x, weight, bias, col, core, row, num_slices)
    eager.check_slices(core.shape[0], first_slice, num_slices)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(x.shape[:-1].numel(), row.shape[0])


def _backward(
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
    transform: str = "dft",
    backend: str = "auto",
) -> eager.Gradients:
    resolve(backend)
    return eager.backward(g, x, h, weight, col, core, row, first_slice, num_slices, scale, transform, needs)


def _backward_fake(
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
    transform: str = "dft",
    backend: str = "auto",
) -> eager.Gradients:
    shapes = [(*g.shape[:-1], row.shape[1]), weight.shape, weight.shape[:1], col.shape, core.shape, row.shape]
    dx, dweight, dbias, dcol, dcore, drow = (
        (core if i == 4 else g).new_empty(shape if needed else (0,))
        for i, (shape, needed) in enumerate(zip(shapes, needs, strict=True))
    )
    return dx, dweight, dbias, dcol, dcore, drow


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, col, core, row, *rest = inputs
    needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row = ctx.needs_input_grad[:6]
    h = output[1]
    # h holds T*r*S numbers, x T*in: for the gradients of core and col either will do, so the smaller one stays.
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


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise RuntimeError("tcurlora::backward has no derivative: a second derivative is not implemented")


def _autocast(device_type: str) -> Any:
    """nn.Linear's rule: floating tensors other than float64 go to the autocast dtype; the core stays as it is."""

    def linear(
        x: Tensor, weight: Tensor, bias: Tensor | None, col: Tensor, core: Tensor, row: Tensor, *rest: Any
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor) -> Tensor:
            lower = tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if lower else tensor

        with torch.amp.autocast(device_type, enabled=False):
            return torch.ops.tcurlora.linear(
                cast(x), cast(weight), bias if bias is None else cast(bias), cast(col), core, cast(row), *rest
            )

    return linear


def _without_autocast(operator: Any, device_type: str) -> Any:
    """The operator as it is: its dtypes are settled, also where a backward pass runs inside autocast."""

    def call(*arguments: Any) -> Any:
        with torch.amp.autocast(device_type, enabled=False):
            return operator(*arguments)

    return call


_library.impl("linear", _linear, "CompositeImplicitAutograd")
_library.impl("linear", _autocast("cpu"), "AutocastCPU")
_library.impl("linear", _autocast("cuda"), "AutocastCUDA")
for _name in ("forward", "backward"):
    for _key, _device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _library.impl(_name, _without_autocast(getattr(torch.ops.tcurlora, _name), _device), _key)
_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("tcurlora::forward", _forward_fake, lib=_library)
torch.library.register_fake("tcurlora::backward", _backward_fake, lib=_library)
torch.library.register_autograd("tcurlora::forward", _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd("tcurlora::backward", _no_second_derivative, lib=_library)
