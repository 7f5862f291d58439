"""What PyTorch's FLOP counter (``torch.utils.flop_counter``) counts for ``torch.ops.tcurlora``: base and adapter.

The count is that of :mod:`tcurlora_ext.maths.flops` for every backend: they are compared by the same work.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from math import prod
from typing import Any

import torch

from tcurlora_ext.maths.flops import CallFlops


def forward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::forward``, whose tensors the counter passes by their shapes."""
    call = _named(torch.ops.tcurlora.forward.default, given, named)
    flops = _call(call["x"], call)
    return flops.base_product() + flops.forward()


def backward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    """FLOPs of ``tcurlora::backward``, whose tensors the counter passes by their shapes."""
    call = _named(torch.ops.tcurlora.backward.default, given, named)
    flops = _call(call["g"], call)
    return flops.base_backward(call["needs"]) + flops.backward(call["needs"], keeps_h=call["h"] is not None)


def _named(operator: Any, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    arguments = operator._schema.arguments
    defaults = {one.name: one.default_value for one in arguments}
    return defaults | dict(zip((one.name for one in arguments), given, strict=False)) | named


def _call(rows: tuple[int, ...], call: dict[str, Any]) -> CallFlops:
    slices, c, r = call["core"]
    sizes = (prod(rows[:-1]), call["num_slices"], slices, call["col"][0], call["row"][1], c, r)
    return CallFlops(*sizes, call["transform"])


def register_if_imported() -> None:
    """Have the counter count the operators where its module is imported already."""
    if "torch.utils.flop_counter" in sys.modules:
        register()


@lru_cache(maxsize=1)
def register() -> None:
    """Have the counter count the operators.

    Imports the counter, and with it Triton where that is installed: 0.2 s, four times what this package takes. So it is
    called when a stack is made, not when this package is imported.
    """
    from torch.utils import flop_counter

    flop_counter.register_flop_formula(torch.ops.tcurlora.forward)(forward_flops)
    flop_counter.register_flop_formula(torch.ops.tcurlora.backward)(backward_flops)
