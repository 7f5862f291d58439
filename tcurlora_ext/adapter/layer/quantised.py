"""Quantised linear layers: recognised by their weight, and read through PEFT, without importing their libraries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether the module's weight is packed integers (bitsandbytes) or a tensor subclass around them (torchao)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    of_other_tensors = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")  # not a DTensor
    return of_other_tensors or not (weight.is_floating_point() or weight.is_complex())


def can_dequantise(module: nn.Module) -> bool:
    """Whether this is a quantised linear layer whose weight PEFT can read; without PEFT none is."""
    return isinstance(module, nn.Linear) and is_quantised(module) and reader_of(module) is not None


def reader_of(module: nn.Module) -> Any:
    """PEFT's access to the weight of a quantised layer; None where PEFT has none, or is not installed."""
    try:
        from peft.utils.quantization_utils import resolve_quantization_backend
    except ImportError:
        return None
    return resolve_quantization_backend(module, get_apply_tensor_subclass=unknown_subclass)


def dequantised(module: nn.Module, reader: Any = None) -> Tensor:
    """The weight (out, in) of a quantised layer as a plain tensor.

    Args:
        module: The layer.
        reader: PEFT's access to its weight; None: the one that PEFT has for it.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # On some CPUs bitsandbytes stores a 4 bit weight in a layout that its dequantisation misreads. Calling
        # state_dict() restores the usual layout.
        module.state_dict()
    weight: Tensor = (reader or reader_of(module)).get_base_weight(module)
    return weight.detach()


def rounds_its_input(module: nn.Module) -> bool:
    """Whether the layer rounds its input to int8: bitsandbytes' 8 bit layer, torchao with quantised activations.

    A change of the input below 1/254 of the largest entry of a token would be rounded away, whatever its sum over the
    features gives.
    """
    weight = getattr(module, "weight", None)
    by_torchao = any(getattr(weight, name, None) is not None for name in ("input_quant_func", "act_quant_kwargs"))
    return by_torchao or any(kind.__name__ == "Linear8bitLt" for kind in type(module).__mro__)


def refuse_quantised(name: str, module: nn.Module) -> None:
    """Raise ValueError where the module is quantised; the message says how it can be adapted."""
    if is_quantised(module):
        raise ValueError(
            f"{name} is quantised: a {type(module).__name__} whose weight is a {type(module.weight).__name__}, "
            "expected a floating dtype. tcur.inject(model, ...) adapts it in its model where PEFT can read its weight"
        )


def unknown_subclass() -> Any:
    """In place of the function by which torchao makes a merged weight: raises TypeError."""
    raise TypeError(
        "cannot merge: how to quantise the merged weight again is unknown, expected a model quantised by transformers"
    )
