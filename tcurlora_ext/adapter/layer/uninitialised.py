"""Lazy layers of PyTorch, which have no weights until they have seen an input."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy


def refuse_uninitialised(model: nn.Module, called: str = "") -> None:
    """Raise ValueError, with the layer's name, where a lazy layer of a model has seen no input.

    Args:
        model: The model.
        called: What the message calls the model itself, if it is a layer.
    """
    for name, module in model.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(is_lazy(one) for one in own if one is not None):
            raise ValueError(
                f"{name or called or 'the model'} is a {type(module).__name__}, which has no weights before its first "
                f"input; run a batch through {called or 'the model'} first"
            )
