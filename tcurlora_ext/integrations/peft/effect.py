"""Adapters of PEFT without effect, as ``adapter/model/effect.py`` finds those of :func:`tcurlora_ext.inject`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from tcurlora_ext.adapter.distributed.dtensor import sharded_parameter
from tcurlora_ext.adapter.model.effect import has_changed, sample, warn_uncalled, warn_zero, was_run

from .layer import TcurLoraLinear

if TYPE_CHECKING:
    from .model import TcurLoraModel


def note_call(tuner: TcurLoraModel) -> None:
    """Warn after the model's first call, through a PeftModel, where layers of the active adapters were not called."""
    if torch.compiler.is_compiling() or tuner.called:
        return
    tuner.called = True
    warn_uncalled(_layers(tuner, tuner.active_adapters), called=True, stacklevel=3)


def warn_without_effect(
    tuner: TcurLoraModel, adapters: Iterable[str], state: Mapping[str, Tensor] | None = None
) -> None:
    """Warn of layers that were never called and of cores that are still zero, where others were called or trained.

    Whoever loads an adapter may well use a part of the model alone: loaded adapters are left out.

    Args:
        tuner: Holds the adapters.
        adapters: Which of them.
        state: The state_dict to save, where it has the cores: those of the model may be sharded. One process may be
            alone in saving it, so that nothing here may gather values.
    """
    for adapter in adapters:
        if adapter not in tuner.loaded:
            layers = _layers(tuner, [adapter])
            warn_uncalled(layers, tuner.called, stacklevel=4)
            cores = _trained_cores(tuner, adapter, state)
            if sharded_parameter(tuner) is None and all(core.numel() for core in cores.values()):
                warn_zero(cores, partial(_changed_beside, tuner, adapter, layers), stacklevel=4)


def _layers(tuner: TcurLoraModel, adapters: Iterable[str]) -> dict[str, TcurLoraLinear]:
    chosen = set(adapters)
    return {
        name: module
        for name, module in tuner.model.named_modules()
        if isinstance(module, TcurLoraLinear) and chosen & module.slices.keys()
    }


def _trained_cores(tuner: TcurLoraModel, adapter: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    saved = {key[key.find("tcurlora_core.") :]: value for key, value in (state or {}).items()}
    return {
        name: saved.get(f"tcurlora_core.{adapter}.{name}.core", stack.core)
        for name, stack in tuner.stacks(adapter).items()
        if stack.core.requires_grad
    }


def _changed_beside(tuner: TcurLoraModel, adapter: str, layers: Mapping[str, TcurLoraLinear]) -> str | None:
    """A parameter of ``modules_to_save`` that differs from the base's, where the model has been called; or None."""
    if not was_run(layers, tuner.called):
        return None
    for name, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            plain = dict(module.original_module.named_parameters())
            for own, parameter in module.modules_to_save[adapter].named_parameters():
                if own in plain and has_changed(sample(plain[own]), parameter):
                    return f"{name}.{own}"
    return None
