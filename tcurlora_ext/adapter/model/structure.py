"""The parts of an adapted model: its adapted layers, and the stacks that it registers."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tcurlora_ext.adapter.config import TCURConfig
from tcurlora_ext.adapter.distributed.dtensor import whole
from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.adapter.stack import TCURStack
from tcurlora_ext.adapter.stack.slices import stacked_in_order
from tcurlora_ext.adapter.subspace import Subspace

CONTAINER = "tcur_stacks"


class TCURStacks(nn.ModuleDict):
    """The stacks of a model, registered once under ``tcur_stacks``, and the configuration of the adapter.

    Args:
        stacks: The stacks by name.
        config: The configuration of the adapter.
        owner: The name of the module that registers it, within the model that was adapted: "" for the model itself. In
            an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` it is the last adapted layer: registered in the
            model, it would be one more item.
        subspace: Where the stacks' factors are learned, what they come from.

    Attributes:
        buffer_sums: Of the model's buffers when it was adapted, see :func:`sums_of_buffers`.
        loaded: The names of the parameters and buffers that :func:`load_adapter` has set beside the stacks.
        from_file: Whether :func:`load_adapter` has set the stacks.
        unfrozen: The parameters that :func:`unfreeze` made train: name -> a sample of the values that they had then
            (``model/effect.py``).
        first_call: The hook that looks at the model's first call (``model/effect.py``); None once that is over.
        called: Whether the model has been called.
    """

    def __init__(
        self, stacks: dict[str, TCURStack], config: TCURConfig, owner: str = "", subspace: Subspace | None = None
    ) -> None:
        super().__init__(stacks)
        self.config, self.owner, self.subspace = config, owner, subspace
        self.buffer_sums: dict[str, tuple[float, ...]] = {}
        self.loaded: set[str] = set()
        self.unfrozen: dict[str, Tensor] = {}
        self.from_file = False
        self.first_call: RemovableHandle | None = None
        self.called = False


@dataclass(frozen=True)
class Adapted:
    """An adapted model, found in itself or in a module around it: a wrapper of DDP or torch.compile, a training module.

    Attributes:
        model: The model that was adapted. Names in stacks and files are relative to it.
        prefix: Its name in the module around it, with a dot at the end; "" where there is none.
        container: Its stacks.
    """

    model: nn.Module
    prefix: str
    container: TCURStacks


def find_adapted(model: nn.Module) -> Adapted | None:
    """The adapted model in ``model``; None where nothing in it is adapted.

    Raises ValueError where several parts were adapted apart, or where adapted layers are here without their stacks.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TCURStacks)]
    kind = type(model).__name__
    if len(found) > 1:
        raise ValueError(
            f"{kind} has {len(found)} adapters, {' and '.join(name for name, _ in found)}, because its parts were "
            "adapted apart; expected one: call this on each part"
        )
    if found:
        name, container = found[0]
        own = f"{container.owner}.{CONTAINER}" if container.owner else CONTAINER
        prefix = name.removesuffix(own)
        if name.endswith(own) and prefix[-1:] in ("", "."):
            return Adapted(model.get_submodule(prefix.rstrip(".")), prefix, container)
    for name, layer in adapted_layers(model):
        if "stack" not in layer._modules:
            where = f"in its {layer.stack.holder}, which is gone or " if layer.stack.holder else "at its root, which "
            raise ValueError(
                f"{kind} is a part of an adapted model: the core that {name or 'this layer'} uses is registered {where}"
                "is not in this part; call this on the model that inject(model) or load_adapter(model, ...) got"
            )
    return None


def require_adapted(model: nn.Module) -> Adapted:
    """As :func:`find_adapted`; raises ValueError where the model is not adapted, too."""
    adapted = find_adapted(model)
    if adapted is None:
        kind = type(model).__name__
        if any(isinstance(module, TCURStack) for module in model.modules()) and not any(adapted_layers(model)):
            raise ValueError(
                f"{kind} is adapted through PEFT; use the PeftModel's own save_pretrained, merge_adapter or unload"
            )
        raise ValueError(f"{kind} is not adapted; call inject(model) first")
    return adapted


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError, naming the first layer, where a model is adapted already: adapters would nest."""
    adapted = next((name for name, _ in adapted_layers(model)), None)
    if adapted is not None or hasattr(model, CONTAINER):
        raise ValueError(
            f"{adapted or CONTAINER} of {type(model).__name__} is adapted already; call remove(model) first, or "
            "merge(model) and then remove(model) to keep that adapter in the weights"
        )


def stacks(model: nn.Module) -> dict[str, TCURStack]:
    """The stacks of an adapted model.

    Args:
        model: An adapted model, or a model that contains one.

    Returns:
        Name -> stack, in the registration order of their first layers; empty where nothing is adapted.

    Raises:
        ValueError: Several parts of the model were adapted apart, or the model is a part of an adapted one.
    """
    adapted = find_adapted(model)
    if adapted is None:
        return {}
    return {name: stack for name, stack in adapted.container.items() if isinstance(stack, TCURStack)}


def require_all_layers(adapted: Adapted) -> None:
    """Raise ValueError where layers of a stack are not in the model any more: dropped, replaced or renamed."""
    layers = dict(adapted_layers(adapted.model))
    for stack_name, stack in stacks(adapted.model).items():
        here = {name for name, layer in layers.items() if layer.stack is stack}
        gone = [name for name in stack.names if module_of(name, here) not in here]
        if gone:
            raise ValueError(
                f"{', '.join(gone[:4])} ({len(gone)} of {stack.slices} slices of stack {stack_name}) is no adapted "
                "layer of the model any more: it was dropped, replaced or renamed after inject"
            )


def module_of(slice_name: str, names: Container[str]) -> str:
    """The module of a slice by the slice's name: the name itself, or without the number of a fused projection."""
    if slice_name in names:
        return slice_name
    return re.sub(r"\[\d+\]$", "", slice_name)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, TCURLayer]]:
    """All adapted layers with their names, in registration order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TCURLayer))


def base_weights(model: nn.Module, stack: TCURStack) -> Tensor:
    """The base weights (S, out, in) of a stack's layers, merged or not; gathered where they are sharded."""
    layers = [layer for _, layer in adapted_layers(model) if layer.stack is stack]
    return stacked_in_order((layer.first_slice, layer.weight_slices()) for layer in layers)


def buffers_beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers of a model (running statistics), those of the stacks left out."""
    for name, module in model.named_modules():
        if CONTAINER in name.split(".") or isinstance(module, TCURStack):
            continue
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                yield f"{name}.{own}".lstrip("."), buffer


def sums_of_buffers(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """The sum and the sum of squares of every persistent buffer: they tell whether training has changed it."""
    return {name: _sums(buffer) for name, buffer in buffers_beside(model)}


def changed_buffers(adapted: Adapted, tolerance: float = 0.0) -> dict[str, Tensor]:
    """The buffers that are not as they were when the model was adapted: statistics of frozen norms move in training.

    ``tolerance`` is relative; 1 % leaves out what a cast to bfloat16 changes.
    """
    before, changed = adapted.container.buffer_sums, {}
    for name, buffer in buffers_beside(adapted.model):
        sums, known = _sums(buffer), before.get(name, ())
        same = len(sums) == len(known) and all(
            math.isclose(a, b, rel_tol=tolerance) for a, b in zip(sums, known, strict=True)
        )
        if not same:
            changed[name] = buffer
    return changed


def trained_beside(adapted: Adapted) -> dict[str, nn.Parameter]:
    """The parameters beside the cores that train, or did: a head that is frozen again was trained by the adapter."""
    kept = adapted.container.unfrozen.keys() | adapted.container.loaded
    return {
        name: parameter
        for name, parameter in adapted.model.named_parameters()
        if (parameter.requires_grad or name in kept) and CONTAINER not in name.split(".")
    }


def _sums(tensor: Tensor) -> tuple[float, ...]:
    if tensor.is_meta:
        return ()
    values = whole(tensor.detach())
    values = torch.view_as_real(values).double() if values.is_complex() else values.double()
    return float(values.sum()), float(values.square().sum())
