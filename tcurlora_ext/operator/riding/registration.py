"""Registers the riding operators: from the C++ extension where it is built, from Python otherwise.

Both forms share what is here: shapes for torch.compile, PyTorch operations for torch.func, and FLOP counts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from tcurlora_ext.operator.backends import BACKENDS

from . import decomposition, python
from .arguments import backend_schemas, check, ride_back_of, ride_of, split, split_backward


def _riding_forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    adapter, _ = split(*rest)
    check(x, weight, bias, adapter)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), _hidden(x, adapter.core)


def _riding_backward_fake(
    g: Tensor, x: Tensor | None, h: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    adapter, needs, _ = split_backward(*rest)
    shapes = ((*g.shape[:-1], weight.shape[1]), weight.shape[:1], adapter.core.shape, adapter.row.shape)
    return _empty(g, adapter.core, shapes, needs)


def _ride_forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    adapter, _ = split(*rest)
    check(x, None, None, adapter)
    return x.new_empty(x.shape), _hidden(x, adapter.core)


def _ride_backward_fake(g: Tensor, x: Tensor | None, h: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    adapter, needs, _ = split_backward(*rest)
    return _empty(g, adapter.core, (g.shape, adapter.core.shape, adapter.row.shape), needs)


def _ride_many_fake(x: Tensor, row: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], row.shape[0])


def _riding_many_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _ride_many_backward_fake(g: Tensor, h: Tensor | None, cores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dh = (g.shape[0], cores.shape[2]) if rest[-1] else (0,)
    return g.new_empty(dh), cores.new_empty((0,) if h is None else cores.shape)


def _hidden(x: Tensor, core: Tensor) -> Tensor:
    # Not torch.Size.numel(), which would fix a symbolic number of tokens to that of the first call.
    return x.new_empty(prod(x.shape[:-1]), core.shape[2])


def _empty(g: Tensor, core: Tensor, shapes: tuple[Any, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients by their shapes, of which the last two are the core's, in the core's dtype, and the row factor's."""
    likes = [g] * (len(shapes) - 2) + [core, g]
    return tuple(
        like.new_empty(shape if needed else (0,)) for like, shape, needed in zip(likes, shapes, needs, strict=True)
    )


def register(library: torch.library.Library, built: bool) -> None:
    """Complete the operators in ``library``; ``built`` says whether the C++ extension has defined them."""
    if not built:
        python.define(library)
    else:
        for backend in BACKENDS.values():
            if backend.in_python:
                forward, back = backend_schemas(backend.name)
                library.define(forward)
                library.define(back)
                library.impl(f"{backend.name}_ride", ride_of(backend), "CompositeExplicitAutograd")
                library.impl(f"{backend.name}_ride_back", ride_back_of(backend), "CompositeExplicitAutograd")
    fakes: dict[str, Callable[..., Any]] = {
        "riding_forward": _riding_forward_fake, "riding_backward": _riding_backward_fake,
        "ride_forward": _ride_forward_fake, "ride_backward": _ride_backward_fake,
    }  # fmt: skip
    for name, fake in fakes.items():
        torch.library.register_fake(f"tcurlora::{name}", fake, lib=library)
    if built:
        torch.library.register_fake("tcurlora::ride_many", _ride_many_fake, lib=library)
        torch.library.register_fake("tcurlora::riding_many", _riding_many_fake, lib=library)
        torch.library.register_fake("tcurlora::ride_many_backward", _ride_many_backward_fake, lib=library)
    # As for ``linear``: torch.func's transforms get PyTorch operations, which they can differentiate and batch.
    library.impl("riding", decomposition.riding, "FuncTorchDynamicLayerFrontMode")
    library.impl("ride", decomposition.ride, "FuncTorchDynamicLayerFrontMode")
