"""The operators ``torch.ops.tcurlora.*``: from the C++ extension where it is built, from Python otherwise.

``linear``    -> y; the operator that layers call.
``forward``   -> (y, h); y is differentiable with respect to every tensor argument, h is not differentiable.
``backward``  -> (dx, dweight, dbias, dcol, dcore, drow); an empty tensor for each that ``needs`` does not ask for.

``backend`` is "auto" or the name of an implementation: "eager", "native" or "triton". For the core's gradient the
smaller of h and x is saved.

Both forms, C++ and Python, share what is registered here: the fake implementations for torch.compile, which compute
shapes only, ``linear`` in PyTorch operations for the transforms of torch.func, and the counts of PyTorch's FLOP
counter.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Gradients
from tcurlora_ext.maths.transforms import TRANSFORMS

from . import decomposition, flops, python
from .arguments import backward_arguments, backward_of, backward_schema, forward_arguments, forward_of, forward_schema
from .backends import BACKENDS
from .backends.choice import as_plain_values, override
from .backends.native import extension
from .checks import check
from .riding import registration as riding


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    factors, _ = forward_arguments(*rest)
    check(x, weight, bias, factors)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    # Not torch.Size.numel(), which would fix a symbolic number of tokens to that of the first call.
    return y, x.new_empty(prod(x.shape[:-1]), factors.row.shape[0])


def _backward_fake(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> Gradients:
    (col, core, row, *_), needs, _ = backward_arguments(*rest)
    shapes = [(*g.shape[:-1], row.shape[1]), weight.shape, weight.shape[:1], col.shape, core.shape, row.shape]
    dx, dweight, dbias, dcol, dcore, drow = (
        (core if i == 4 else g).new_empty(shape if needed else (0,))
        for i, (shape, needed) in enumerate(zip(shapes, needs, strict=True))
    )
    return dx, dweight, dbias, dcol, dcore, drow


def _decomposed(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return decomposition.linear(x, weight, bias, forward_arguments(*rest)[0])


def tell_names() -> None:
    """Give the extension the names that the operators take: of all backends, and of the transforms with one core."""
    built = extension()
    if built is not None:
        built.set_names(list(BACKENDS), [one.name for one in TRANSFORMS.values() if one.shares_core])


override()  # an unknown name in the environment is an error here, not in the middle of a step
_extension = extension()
if _extension is None:
    _library = torch.library.Library("tcurlora", "DEF")
    python.define(_library)
else:
    _library = torch.library.Library("tcurlora", "FRAGMENT")
    for _backend in BACKENDS.values():
        if _backend.in_python:
            _library.define(forward_schema(f"{_backend.name}_forward", "str transform"))
            _library.define(backward_schema(f"{_backend.name}_backward", "str transform"))
            _library.impl(f"{_backend.name}_forward", forward_of(_backend), "CompositeExplicitAutograd")
            _library.impl(f"{_backend.name}_backward", backward_of(_backend), "CompositeExplicitAutograd")
    _extension.set_choices(as_plain_values)
tell_names()
riding.register(_library, built=_extension is not None)
torch.library.register_fake("tcurlora::forward", _forward_fake, lib=_library)
torch.library.register_fake("tcurlora::backward", _backward_fake, lib=_library)
# This key has priority over every transform of torch.func (vmap, grad, jvp). They cannot differentiate or batch a C++
# autograd function, so they get the operator as PyTorch operations.
_library.impl("linear", _decomposed, "FuncTorchDynamicLayerFrontMode")
flops.register_if_imported()
