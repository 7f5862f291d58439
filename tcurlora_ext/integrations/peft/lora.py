"""The adapter of a PeftModel as a LoRA adapter."""

from __future__ import annotations

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.files.lora import SHARDED, LoraSource
from tcurlora_ext.adapter.model.support import is_conv1d
from tcurlora_ext.adapter.stack import TCURStack

from .config import TYPE, TcurLoraConfig
from .layer import TcurLoraLinear
from .targets import base_of, outer_modules

# Fields that mean the same in PEFT's LoraConfig.
SAME = ("task_type", "revision", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")
SAME_WHERE_GIVEN = ("base_model_name_or_path", "layer_replication")


def source_of(model: PeftModel, adapter_name: str | None = None) -> LoraSource:
    """What the LoRA adapter of a PeftModel is made from.

    Args:
        model: The model.
        adapter_name: Which adapter; None: the active one.

    Raises:
        ValueError: As :func:`tcurlora_ext.to_lora`.
    """
    name = _the_adapter(model, adapter_name)
    config = model.peft_config[name]
    if not isinstance(config, TcurLoraConfig):
        raise ValueError(f"adapter {name} is a {config.peft_type.value} adapter, expected {TYPE}")
    refuse_sharded(model, SHARDED)
    _refuse_trained_beside(model, name, config)
    base = model.base_model.model
    outer = list(outer_modules(base))
    layers = {
        module_name: module.slices[name]
        for module_name, module in outer
        if isinstance(module, TcurLoraLinear) and name in module.slices
    }
    state = get_peft_model_state_dict(model, adapter_name=name)
    beside = {
        key: value for key, value in state.items() if not any(part.startswith("tcurlora_") for part in key.split("."))
    }
    options = {field: getattr(config, field) for field in SAME}
    options |= {field: value for field in SAME_WHERE_GIVEN if (value := getattr(config, field))}
    transposed = any(is_conv1d(base_of(module)) for module_name, module in outer if module_name in layers)
    return LoraSource(base, layers, [other for other, _ in outer], transposed, beside, options)


def _the_adapter(model: PeftModel, adapter_name: str | None) -> str:
    if adapter_name is None:
        active = list(getattr(model.base_model, "active_adapters", [model.active_adapter]))
        if len(active) != 1:
            raise ValueError(
                f"{', '.join(active) or 'no adapter'} is active, expected adapter_name to name one adapter"
            )
        return str(active[0])
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter {adapter_name} does not exist, expected one of {', '.join(model.peft_config)}")
    return adapter_name


def _refuse_trained_beside(model: PeftModel, adapter_name: str, config: TcurLoraConfig) -> None:
    """Raise ValueError for what was trained beside the cores and is neither in modules_to_save nor a token's row."""
    if config.bias != "none":
        raise ValueError(
            f"adapter {adapter_name} trains biases (bias={config.bias!r}), which a LoRA adapter with bias='none' does "
            "not hold; merge_and_unload() keeps them"
        )
    held = (TCURStack, AuxiliaryTrainingWrapper)
    known = {id(p) for module in model.modules() if isinstance(module, held) for p in module.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise ValueError(
            f"{', '.join(others[:4])} ({len(others)} parameters) train beside the cores, and PEFT keeps only whole "
            "modules beside an adapter: name their modules in modules_to_save"
        )
