"""Quantised linear layers, recognised by their weight, without importing a quantisation library."""

from __future__ import annotations

from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether the module's weight is packed integers (bitsandbytes) or a tensor subclass around them (torchao)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    of_other_tensors = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")  # not a DTensor
    return of_other_tensors or not (weight.is_floating_point() or weight.is_complex())


def refuse_quantised(name: str, module: nn.Module) -> None:
    """Raise ValueError where the module is quantised; the message says how it can be adapted."""
    if is_quantised(module):
        raise ValueError(
            f"{name} is quantised: a {type(module).__name__} whose weight is a {type(module.weight).__name__}, "
            "expected a floating dtype. PEFT can adapt it: get_peft_model(model, TcurLoraConfig(...)) with "
            "TcurLoraConfig from tcurlora_ext.integrations.peft"
        )
