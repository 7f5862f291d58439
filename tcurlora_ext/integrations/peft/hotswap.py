"""Replacing a loaded adapter by a saved one in place, which PEFT itself supports for LoRA only."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from tcurlora_ext.adapter.model.targets import slice_names
from tcurlora_ext.adapter.stack import TCURStack

from .config import TcurLoraConfig
from .directions import without_directions
from .indices import BASE, saved_key
from .layer import TcurLoraLinear
from .sharing import FACTORS
from .targets import find_groups
from .weighted import require_same


def hotswap_adapter(
    model: PeftModel, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Copy the values of a saved adapter into a loaded one, in place: a compiled model is not compiled again.

    Both adapters need the same stacks and ranks. The loaded adapter keeps its name, configuration and scale; where the
    saved scale differs, the cores are multiplied by the ratio.

    Args:
        model: The model, compiled or not.
        model_name_or_path: The saved adapter.
        adapter_name: The loaded adapter.
        torch_device: The device to which the values are read, as for PEFT's function of this name.
        **kwargs: Passed on to PEFT's functions that read configuration and values.

    Raises:
        ValueError: Stacks, ranks or options differ, the adapter is merged, or the checkpoint has more than stacks;
            nothing is changed.
    """
    model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter {adapter_name} does not exist, expected one of {', '.join(model.peft_config)}")
    for name, layer in model.named_modules():
        if isinstance(layer, TcurLoraLinear) and adapter_name in layer.merged_adapters:
            raise ValueError(f"{name} holds adapter {adapter_name} merged, call unmerge_adapter() first")
    config = TcurLoraConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(config, TcurLoraConfig):
        raise ValueError(f"{model_name_or_path} is a {config.peft_type.value} adapter, expected TCURLORA")
    require_same({adapter_name: model.peft_config[adapter_name], str(model_name_or_path): config})
    stacks = model.base_model.stacks(adapter_name)
    layers = {name: slice_names(members) for name, members in find_groups(model.base_model.model, config).items()}
    for name in sorted(stacks.keys() | layers.keys()):
        here, there = stacks[name].names if name in stacks else [], layers.get(name, [])
        if here != there:
            raise ValueError(
                f"stack {name} has the layers {', '.join(here)} in adapter {adapter_name} and {', '.join(there)} in "
                f"{model_name_or_path}, expected the same"
            )
    state = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    of_stacks = without_directions(state)
    beside = {key: value for key, value in state.items() if key not in of_stacks}
    of_stacks = _at_scale_of(stacks, of_stacks, model_name_or_path)
    set_peft_model_state_dict(model, beside | of_stacks, adapter_name)


def _at_scale_of(stacks: dict[str, TCURStack], state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Convert a checkpoint to the scales of these stacks. Raises ValueError where it does not fit them."""
    state = dict(state)
    own = {saved_key(name, kind): value for name, s in stacks.items() for kind, value in s.state_dict().items()}
    optional = {saved_key(name, kind) for name in stacks for kind in (*BASE, *FACTORS)}
    odd = (state.keys() ^ own.keys()) - optional
    if odd:
        raise ValueError(
            f"{path}: only one of the adapters has {', '.join(sorted(odd)[:3])}, expected the same stacks and no more"
        )
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise ValueError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}")
    for name, stack in stacks.items():
        core, scale = saved_key(name, "core"), saved_key(name, "scale")
        if float(state[scale]) != stack.scale:
            # Compiled code has the scale as a constant: another scale would need another compilation.
            state[core] = state[core] * (float(state[scale]) / stack.scale)
            state[scale] = own[scale]
    return state
