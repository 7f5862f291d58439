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

import torch
from torch import Tensor

from . import eager, flops, fused, plain, python
from .available import extension
from .choice import override
from .choice import plain as plain_choices


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
    # Not torch.Size.numel(), which would make a symbolic number of tokens the one of the first call.
    return y, x.new_empty(prod(x.shape[:-1]), row.shape[0])


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


override()  # an unknown name in the environment is an error here, not in the middle of a step
_extension = extension()
if _extension is None:
    _library = torch.library.Library("tcurlora", "DEF")
    python.define(_library)
else:
    _library = torch.library.Library("tcurlora", "FRAGMENT")
    for _name, _implementation in (("eager", eager), ("triton", fused)):
        _library.impl(f"{_name}_forward", _implementation.forward, "CompositeExplicitAutograd")
        _library.impl(f"{_name}_backward", _implementation.backward, "CompositeExplicitAutograd")
    _extension.set_choices(plain_choices)
torch.library.register_fake("tcurlora::forward", _forward_fake, lib=_library)
torch.library.register_fake("tcurlora::backward", _backward_fake, lib=_library)
# Above every transform of torch.func, which take a C++ autograd function for none of theirs.
_library.impl("linear", plain.linear, "FuncTorchDynamicLayerFrontMode")
flops.register()
