"""The two ways to adapt a model, ``tcur.inject`` and PEFT, with one interface: tests of both take an ``entry``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import tcurlora_ext as tcur
from tcurlora_ext.adapter.distributed.dtensor import sharded_parameter
from tcurlora_ext.adapter.model.support import is_conv1d
from tcurlora_ext.integrations.peft import TcurLoraConfig


class Entry(Protocol):
    """What users do with an adapter. Models may be changed in place; use the returned model afterwards."""

    def adapt(self, model: nn.Module, head: str | None = None, **options: Any) -> nn.Module:
        """``head``: a module that also trains. ``options``: rank, subspace, and options that both entries have."""

    def stacks(self, model: nn.Module) -> dict[str, tcur.TCURStack]: ...

    def trained(self, model: nn.Module) -> int:
        """The number of trained parameters, as counted by the library."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save an adapter; for a sharded model all processes call this."""

    def load(self, model: nn.Module, folder: Path) -> nn.Module: ...

    def merge(self, model: nn.Module) -> nn.Module:
        """A model of plain layers with W + dW."""

    def unload(self, model: nn.Module) -> nn.Module:
        """The base model, without adapter."""


class Inject:
    def adapt(
        self, model: nn.Module, head: str | None = None, subspace: tcur.Subspace | None = None, **options: Any
    ) -> nn.Module:
        tcur.inject(model, tcur.TCURConfig(**options), subspace=subspace)
        return tcur.unfreeze(model, head) if head else model

    def stacks(self, model: nn.Module) -> dict[str, tcur.TCURStack]:
        return tcur.stacks(model)

    def trained(self, model: nn.Module) -> int:
        return tcur.summary(model).trained

    def save(self, model: nn.Module, folder: Path) -> None:
        tcur.save_adapter(model, folder / "adapter.safetensors")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        return tcur.load_adapter(model, folder / "adapter.safetensors")

    def merge(self, model: nn.Module) -> nn.Module:
        return tcur.remove(tcur.merge(model))

    def unload(self, model: nn.Module) -> nn.Module:
        return tcur.remove(model)


class Peft:
    def adapt(self, model: nn.Module, head: str | None = None, *, rank: Any = 8, **options: Any) -> nn.Module:
        config = TcurLoraConfig(
            r=rank,
            task_type="CAUSAL_LM" if hasattr(model, "can_generate") and model.can_generate() else None,
            modules_to_save=[head] if head else None,
            fan_in_fan_out=any(is_conv1d(module) for module in model.modules()),
            **options,
        )
        return get_peft_model(model, config)

    def stacks(self, model: Any) -> dict[str, tcur.TCURStack]:
        return model.base_model.stacks("default")

    def trained(self, model: Any) -> int:
        return model.get_nb_trainable_parameters()[0]

    def save(self, model: Any, folder: Path) -> None:
        first, state = not distributed.is_initialized() or distributed.get_rank() == 0, None
        if sharded_parameter(model):
            options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
            state = get_model_state_dict(model, options=options)
        model.save_pretrained(folder, state_dict=state, is_main_process=first)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(model, folder)

    def merge(self, model: Any) -> nn.Module:
        return model.merge_and_unload()

    def unload(self, model: Any) -> nn.Module:
        return model.unload()


ENTRIES: dict[str, Entry] = {"inject": Inject(), "peft": Peft()}
