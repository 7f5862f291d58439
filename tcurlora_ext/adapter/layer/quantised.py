"""Linear layers whose weight is not a matrix of floating numbers, told by the weight: nothing has to be imported."""

from __future__ import annotations

from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether the module's weight is packed integers (bitsandbytes) or a tensor made of such (torchao)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    of_other_tensors = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")  # not a DTensor
    return of_other_tensors or not weight.is_floating_point()


def refuse_quantised(name: str, module: nn.Module) -> None:
    """Raises ValueError where the module is quantised, with the way to adapt it."""
    if is_quantised(module):
        raise ValueError(
            f"{name} is quantised: a {type(module).__name__} whose weight is a {type(module.weight).__name__}, "
            "expected floating numbers. Through PEFT it can be adapted: get_peft_model(model, TcurLoraConfig(...)) of "
            "tcurlora_ext.integrations.peft"
        )
