"""What `to_lora` refuses to write, by the name of what is wrong, with nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tcurlora_ext as tcur

from ..conftest import Network
from .written import Tied, inject


def sharded(model: nn.Module) -> nn.Module:
    parameter = next(model.parameters())
    parameter.full_tensor = lambda: parameter.data  # as DTensors, which FSDP2 makes, are recognised
    return model


def at_two_places(model: nn.Module) -> nn.Module:
    model.again = model.get_submodule("blocks.0.mlp")._modules["linear1"]
    return model


def not_finite(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        tcur.stacks(model)["8x8"].core[0, 0, 0] = torch.nan
    return model


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any], str]] = {
    "rank": (
        lambda m: m,
        {"max_rank": 15},
        r"qkv: the LoRA rank is 16, expected at most max_rank = 15.*stack_bl",
    ),
    "no rank": (lambda m: m, {"max_rank": 0}, "max_rank is 0, expected a positive whole number"),
    "not adapted": (tcur.remove, {}, r"Network is not adapted; call inject\(model\) first"),
    "a part": (lambda m: m.get_submodule("blocks"), {}, "is a part of an adapted model"),
    "adapter_name": (
        lambda m: m,
        {"adapter_name": "default"},
        "expected None: Network has no adapters of PEFT",
    ),
    "bias": (
        lambda m: tcur.unfreeze(m, ["blocks.1.mlp.linear1.bias"]),
        {},
        r"blocks\.1\.mlp\.linear1\.bias was trained beside the cores.*belongs to an adapted layer",
    ),
    "sharded": (sharded, {}, r"embed\.weight is sharded over several processes; save the adapter"),
    "two places": (at_two_places, {}, r"again and blocks\.0\.mlp\.linear1 are one adapted module at two places"),
    "not finite": (not_finite, {}, r"lora_B.weight has NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_adapter_is_refused_and_nothing_written(case: str, base: Network, tmp_path: Path) -> None:
    change, options, message = REFUSED[case]
    model = change(inject(base))
    with pytest.raises(ValueError, match=message):
        tcur.to_lora(model, tmp_path / "lora", **options)
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_the_model_itself_are_refused(tmp_path: Path) -> None:
    model = tcur.unfreeze(inject(Tied(), target_modules=["body"]), ["shift"])
    with pytest.raises(ValueError, match=r"shift was trained beside the cores.*belongs to the model itself"):
        tcur.to_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_peft_would_find_within_its_own_layers_is_refused(base: Network, tmp_path: Path) -> None:
    base.out = nn.Linear(3, 3).double()
    model = tcur.unfreeze(inject(base), ["out"])
    with pytest.raises(ValueError, match=r"out .*PEFT goes by the ends of names.* lora_dropout of its own layers"):
        tcur.to_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_parameters_around_adapted_layers_are_refused(tmp_path: Path) -> None:
    base = nn.ModuleDict({"inner": Tied()})
    model = tcur.unfreeze(inject(base, target_modules=["body"]), [r"inner\.shift"])
    with pytest.raises(ValueError, match=r"inner\.shift .*its module inner contains the adapted layer inner\.body"):
        tcur.to_lora(model, tmp_path / "lora")


def test_a_missing_peft_is_named(base: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="'peft' is not installed; expected it to write"):
        tcur.to_lora(inject(base), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
