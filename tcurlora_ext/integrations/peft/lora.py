"""An adapter that was added through PEFT as a LoRA adapter."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper

from tcurlora_ext.adapter.distributed.dtensor import refuse_sharded
from tcurlora_ext.adapter.files.lora import SHARDED, LoraSource, conv_kernels
from tcurlora_ext.adapter.model.support import is_conv1d
from tcurlora_ext.adapter.stack import TCURStack

from .config import TcurLoraConfig
from .experts import TcurLoraExperts
from .layer import TcurLoraLinear
from .targets import base_of, outer_modules

# Fields that mean the same in PEFT's LoraConfig.
SAME = ("task_type", "revision", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")
SAME_WHERE_GIVEN = ("base_model_name_or_path", "layer_replication")


def lora_source(tuner: BaseTuner, adapter_name: str | None) -> LoraSource:
    """What the LoRA adapter of a model adapted through PEFT is made from.

    Args:
        tuner: The :class:`TcurLoraModel`.
        adapter_name: Which adapter; None: the active one.

    Raises:
        ValueError: As :func:`tcurlora_ext.to_lora`.
    """
    name = _the_adapter(tuner, adapter_name)
    config = tuner.peft_config[name]
    refuse_sharded(tuner, SHARDED)
    _refuse_trained_beside(tuner, name, config)
    outer = list(outer_modules(tuner.model))
    adapted = {n: module for n, module in outer if isinstance(module, TcurLoraLinear) and name in module.slices}
    experts = next((n for n, module in adapted.items() if isinstance(module, TcurLoraExperts)), None)
    if experts is not None:
        raise ValueError(
            f"{experts} is a parameter with all experts of a layer, which a LoRA adapter in PEFT's target_modules "
            "cannot name; use merge_and_unload()"
        )
    state = get_peft_model_state_dict(tuner, adapter_name=name)
    options = {field: getattr(config, field) for field in SAME}
    options |= {field: value for field in SAME_WHERE_GIVEN if (value := getattr(config, field))}
    return LoraSource(
        tuner.model,
        {n: module.slices[name] for n, module in adapted.items()},
        [other for other, _ in outer],
        any(is_conv1d(base_of(module)) for module in adapted.values()),
        {f"base_model.{key}": value for key, value in state.items() if not _is_of_stacks(key)},
        options,
        conv_kernels({n: base_of(module) for n, module in adapted.items()}),
    )


def _is_of_stacks(key: str) -> bool:
    return any(part.startswith("tcurlora_") for part in key.split("."))


def _the_adapter(tuner: BaseTuner, adapter_name: str | None) -> str:
    if adapter_name is None:
        active = list(tuner.active_adapters)
        if len(active) != 1:
            raise ValueError(f"{', '.join(active) or 'no adapter'} is active, expected adapter_name to name one")
        return str(active[0])
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"adapter {adapter_name} does not exist, expected one of {', '.join(tuner.peft_config)}")
    return adapter_name


def _refuse_trained_beside(tuner: BaseTuner, adapter_name: str, config: TcurLoraConfig) -> None:
    """Raise ValueError for what was trained beside the cores and is neither in modules_to_save nor a token's row."""
    if config.bias != "none":
        raise ValueError(
            f"adapter {adapter_name} trains biases (bias={config.bias!r}), which a LoRA adapter with bias='none' does "
            "not hold; merge_and_unload() keeps them"
        )
    held = (TCURStack, AuxiliaryTrainingWrapper)
    known = {id(p) for module in tuner.modules() if isinstance(module, held) for p in module.parameters()}
    others = [name for name, p in tuner.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise ValueError(
            f"{', '.join(others[:4])} ({len(others)} parameters) train beside the cores, and PEFT keeps only whole "
            "modules beside an adapter: name their modules in modules_to_save"
        )
