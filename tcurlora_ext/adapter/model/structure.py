"""The parts of an adapted model: its adapted layers, and the stacks registered at its root."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import stacked_in_order

CONTAINER = "tcur_stacks"


class TCURStacks(nn.ModuleDict):
    """The stacks of a model, registered once at its root under ``tcur_stacks``, and the configuration of the adapter.

    Its forward returns its input, so that an ``nn.Sequential`` to which it is added computes the same as before.
    """

    def __init__(self, stacks: dict[str, TCURStack], config: TCURConfig) -> None:
        super().__init__(stacks)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return x


def find_container(model: nn.Module) -> TCURStacks | None:
    """The container of the stacks of ``model``, or of an adapted model inside it; None where there is none."""
    return next((module for module in model.modules() if isinstance(module, TCURStacks)), None)


def require_container(model: nn.Module) -> TCURStacks:
    """As :func:`find_container`; raises ValueError where the model is not adapted."""
    container = find_container(model)
    if container is None:
        raise ValueError(f"{type(model).__name__} is not adapted; call inject(model) first")
    return container


def stacks(model: nn.Module) -> dict[str, TCURStack]:
    """The stacks of an adapted model.

    Args:
        model: An adapted model, or a model that contains one.

    Returns:
        Name -> stack, in the registration order of their first layers; empty where nothing is adapted.
    """
    container = find_container(model)
    if container is None:
        return {}
    return {name: stack for name, stack in container.items() if isinstance(stack, TCURStack)}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, TCURLayer]]:
    """All adapted layers with their names, in registration order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TCURLayer))


def base_weights(model: nn.Module, stack: TCURStack) -> Tensor:
    """The base weights (S, out, in) of a stack's layers, merged or not; gathered where they are sharded."""
    layers = [layer for _, layer in adapted_layers(model) if layer.stack is stack]
    return stacked_in_order((layer.first_slice, layer.weight_slices()) for layer in layers)
