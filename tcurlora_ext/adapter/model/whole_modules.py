"""What was trained beside the cores as whole modules: the form in which PEFT's ``modules_to_save`` keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tcurlora_ext.adapter.layer.linear import TCURLayer

from .structure import CONTAINER, Adapted, changed_buffers, trained_beside

# Modules that are never called themselves: PEFT's wrapper, which takes the place of a module, refuses them.
UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class WholeModules(dict[str, nn.Module]):
    """Modules by name, as PEFT finds them for a list of names.

    Attributes:
        names: The list of names. PEFT also takes modules whose names merely end alike; they are among the modules.
    """

    names: list[str]


def modules_to_save(adapted: Adapted) -> WholeModules:
    """The modules that own parameters trained beside the cores, or running statistics that training has changed.

    Raises:
        ValueError: Not all of that is in modules that PEFT can replace by trained copies; the message names the
            parameter, and the reason.
    """
    modules = dict(_modules(adapted.model))
    layers = [name for name, module in modules.items() if isinstance(module, TCURLayer)]
    owners = _owners(adapted, modules)
    for name, tensor in owners.items():
        reason = _reason_against(name, modules[name], layers)
        if reason:
            raise ValueError(
                f"{tensor} was trained beside the cores, and a LoRA adapter cannot hold it: {reason}. PEFT keeps whole "
                "modules beside an adapter (modules_to_save); merge(model) keeps everything"
            )
    found = WholeModules()
    found.names = [name for name in owners if not any(name.startswith(f"{other}.") for other in owners)]
    found.update((name, module) for name, module in modules.items() if name.endswith(tuple(found.names)))
    _require_clear_names(found, layers)
    return found


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules under all their names, those of the stacks left out."""
    named = model.named_modules(remove_duplicate=False)
    return ((name, module) for name, module in named if CONTAINER not in name.split("."))


def _owners(adapted: Adapted, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The names of the modules that own such a tensor, all names of tied ones -> the name of the tensor."""
    trained = {id(parameter) for parameter in trained_beside(adapted).values()}
    named = adapted.model.named_parameters(remove_duplicate=False)
    tensors = [*(name for name, p in named if id(p) in trained), *changed_buffers(adapted)]
    owners = {id(modules[name.rpartition(".")[0]]): name for name in reversed(tensors)}
    return {name: owners[id(module)] for name, module in modules.items() if id(module) in owners}


def _reason_against(name: str, module: nn.Module, layers: list[str]) -> str:
    if isinstance(module, TCURLayer):
        return "it belongs to an adapted layer"
    if not name:
        return "it belongs to the model itself, not to a module in it"
    inside = next((layer for layer in layers if layer.startswith(f"{name}.")), None)
    if inside is not None:
        return f"its module {name} contains the adapted layer {inside}"
    if isinstance(module, UNCALLED):
        return f"its module {name} is a {type(module).__name__}, which is never called"
    return ""


def _require_clear_names(found: WholeModules, layers: list[str]) -> None:
    """Raise ValueError where PEFT, which goes by the ends of names, would take modules that cannot be taken."""
    for own in found.names:
        # PEFT's own rule: what modules_to_save names, as a part of a layer's name too, gets no adapter
        layer = next((layer for layer in layers if re.match(rf"(^|.*\.){own}($|\..*)", layer)), None)
        if layer is not None:
            raise ValueError(f"{own} was trained beside the cores: PEFT would take the adapted layer {layer} for it")
    for name, module in found.items():
        reason = _reason_against(name, module, layers)
        outer = next((other for other in found if name.startswith(f"{other}.")), None)
        if outer is not None:
            reason = f"it is in {outer}, which is one too"
        if reason:
            raise ValueError(
                f"{', '.join(found.names)} (trained beside the cores): PEFT goes by the ends of names and would also "
                f"take {name}, which it cannot: {reason}"
            )


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters and persistent buffers of modules by their names in the model."""
    return {
        f"{name}.{own}": value
        for name, module in modules.items()
        for own, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }
