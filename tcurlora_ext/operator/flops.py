"""The counts of PyTorch's FLOP counter (``torch.utils.flop_counter``) for ``torch.ops.tcurlora``: base and adapter.

The count is that of :mod:`tcurlora_ext.maths.flops` for every backend, so that backends are compared on the same work.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from math import prod
from typing import Any

import torch

from tcurlora_ext.maths.flops import CallFlops, RidingFlops


def forward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::forward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.forward.default, given, named)
    flops = _call(call["x"], call)
    return flops.base_product() + flops.forward()


def backward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::backward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.backward.default, given, named)
    flops = _call(call["g"], call)
    return flops.base_backward(call["needs"]) + flops.backward(call["needs"], keeps_h=call["h"] is not None)


def riding_forward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::riding_forward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.riding_forward.default, given, named)
    flops = _riding(call["x"], call["weight"][0], call)
    return flops.base_product() + flops.forward()


def riding_backward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::riding_backward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.riding_backward.default, given, named)
    needs_x, _, *rest = call["needs"]
    flops = _riding(call["g"], call["weight"][0], call)
    return flops.base_backward(needs_x, any(rest)) + flops.backward([needs_x, *rest])


def ride_forward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::ride_forward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.ride_forward.default, given, named)
    return _riding(call["x"], 0, call).forward()


def ride_backward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::ride_backward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.ride_backward.default, given, named)
    return _riding(call["g"], 0, call).backward(call["needs"])


def riding_many_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::riding_many``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.riding_many.default, given, named)
    flops = _many(call["x"], call["weight"][0], call["cores"])
    return flops.base_product() + flops.forward()


def ride_many_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::ride_many``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.ride_many.default, given, named)
    return _many(call["x"], 0, call["cores"]).forward()


def ride_many_backward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::ride_many_backward``; the counter passes shapes in place of tensors."""
    call = _named(torch.ops.tcurlora.ride_many_backward.default, given, named)
    return 2 * call["order"][0] * prod(call["cores"][1:]) * ((call["h"] is not None) + call["needs_h"])


def _many(rows: tuple[int, ...], out: int, cores: tuple[int, ...]) -> RidingFlops:
    return RidingFlops(prod(rows[:-1]), out, rows[-1], *cores[-2:])


def _riding(rows: tuple[int, ...], out: int, call: dict[str, Any]) -> RidingFlops:
    _, c, r = call["core"]
    return RidingFlops(prod(rows[:-1]), out, call["row"][1], c, r)


def _named(operator: Any, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the operator's schema, defaults included."""
    arguments = operator._schema.arguments
    defaults = {one.name: one.default_value for one in arguments}
    return defaults | dict(zip((one.name for one in arguments), given, strict=False)) | named


def _call(rows: tuple[int, ...], call: dict[str, Any]) -> CallFlops:
    slices, c, r = call["core"]
    sizes = (prod(rows[:-1]), call["num_slices"], slices, call["col"][0], call["row"][1], c, r)
    return CallFlops(*sizes, call["transform"])


def register_if_imported() -> None:
    """Register the operators with the FLOP counter if its module is already imported."""
    if "torch.utils.flop_counter" in sys.modules:
        register()


@lru_cache(maxsize=1)
def register() -> None:
    """Register the operators with the FLOP counter.

    This imports the counter, and with it Triton where that is installed. It takes 0.2 s, four times the import of this
    package, and therefore happens when a stack is built, not when this package is imported.
    """
    from torch.utils import flop_counter

    functions = [
        forward_flops, backward_flops, riding_forward_flops, riding_backward_flops, ride_forward_flops,
        ride_backward_flops,
    ]  # fmt: skip
    if hasattr(torch.ops.tcurlora, "riding_many"):  # in C++ alone
        functions += [riding_many_flops, ride_many_flops, ride_many_backward_flops]
    for function in functions:
        operator = getattr(torch.ops.tcurlora, function.__name__.removesuffix("_flops"))
        flop_counter.register_flop_formula(operator)(function)
