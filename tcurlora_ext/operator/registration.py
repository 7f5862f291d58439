"""The operators ``torch.ops.tcurlora.*``: from the C++ extension where it is built, from Python otherwise.

``linear``    the differentiable one: y only.
``forward``   -> (y, h); differentiable with respect to every tensor, h is not.
``backward``  -> (dx, dweight, dbias, dcol, dcore, drow), an empty tensor where ``needs`` says no.

``backend`` is "auto" or the name of an implementation: "eager", "native" or "triton". For the core's gradient the
smaller of h and x is saved.
The shape-only fakes, which torch.compile needs, what torch.func's transforms see (``linear`` written out) and what
PyTorch's FLOP counter counts are the same for both.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.maths.contract import Gradients

from . import eager, flops, fused, plain, python
from .arguments import backward_arguments, backward_of, forward_arguments, forward_of
from .available import extension
from .choice import override
from .choice import plain as plain_choices


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    factors, _ = forward_arguments(*rest)
    eager.check(x, weight, bias, factors)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    # Not torch.Size.numel(), which would make a symbolic number of tokens the one of the first call.
    return y, x.new_empty(prod(x.shape[:-1]), factors.row.shape[0])


def _backward_fake(g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any) -> Gradients:
    (col, core, row, *_), needs, _ = backward_arguments(*rest)
    shapes = [(*g.shape[:-1], row.shape[1]), weight.shape, weight.shape[:1], col.shape, core.shape, row.shape]
    dx, dweight, dbias, dcol, dcore, drow = (
        (core if i == 4 else g).new_empty(shape if needed else (0,))
        for i, (shape, needed) in enumerate(zip(shapes, needs, strict=True))
    )
    return dx, dweight, dbias, dcol, dcore, drow


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return plain.linear(x, weight, bias, forward_arguments(*rest)[0])


override()  # an unknown name in the environment is an error here, not in the middle of a step
_extension = extension()
if _extension is None:
    _library = torch.library.Library("tcurlora", "DEF")
    python.define(_library)
else:
    _library = torch.library.Library("tcurlora", "FRAGMENT")
    for _name, _implementation in (("eager", eager), ("triton", fused)):
        _library.impl(f"{_name}_forward", forward_of(_implementation), "CompositeExplicitAutograd")
        _library.impl(f"{_name}_backward", backward_of(_implementation), "CompositeExplicitAutograd")
    _extension.set_choices(plain_choices)
torch.library.register_fake("tcurlora::forward", _forward_fake, lib=_library)
torch.library.register_fake("tcurlora::backward", _backward_fake, lib=_library)
# Above every transform of torch.func, which take a C++ autograd function for none of theirs.
_library.impl("linear", _plain, "FuncTorchDynamicLayerFrontMode")
flops.register()
