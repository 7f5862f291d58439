"""``target_modules=None`` in PEFT adapts what :func:`tcurlora_ext.inject` adapts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from peft import get_peft_model
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.adapter.model.structure import adapted_layers
from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear


def block(layers: Mapping[str, nn.Module]) -> nn.Module:
    return nn.ModuleDict(dict(layers))


class Unknown(nn.Module):
    """Blocks of unknown names; that of one layer ends as that of a convolution outside the blocks does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block({"proj": nn.Conv1d(8, 8, 1)})
        self.stages = nn.ModuleList(
            block({"wq": nn.Linear(8, 8), "proj": nn.Linear(8, 8), "mlp": nn.Sequential(nn.Linear(8, 12), nn.GELU())})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(8, 5)


def adapted_by_peft(model: nn.Module, config: TcurLoraConfig) -> tuple[set[str], set[str]]:
    """The adapted layers, and the ``target_modules`` that PEFT saves."""
    peft = get_peft_model(model, config)
    layers = {name for name, module in peft.base_model.model.named_modules() if isinstance(module, TcurLoraLinear)}
    return layers, set(peft.peft_config["default"].target_modules)


def test_the_same_layers_as_inject_whatever_their_names() -> None:
    layers, names = adapted_by_peft(Unknown(), TcurLoraConfig(r=2))
    assert layers == {name for name, _ in adapted_layers(tcur.inject(Unknown(), tcur.TCURConfig(rank=2)))}
    assert layers == {f"stages.{i}.{name}" for i in (0, 1) for name in ("wq", "proj", "mlp.0")}
    # Short names where they are clear: "proj" also ends stem.proj, and after the last number of mlp.0 is nothing.
    assert names == {"wq", *(f"stages.{i}.{name}" for i in (0, 1) for name in ("proj", "mlp.0"))}


@pytest.mark.parametrize("option", [{"layers_to_transform": [0]}, {"layer_replication": [(0, 2), (1, 2)]}])
def test_whole_names_exclude_options_that_choose_layers_by_number(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set `target_modules`.*stages\.0\.mlp\.0, stages\.0\.proj"):
        get_peft_model(Unknown(), TcurLoraConfig(r=2, **option))


def test_layers_narrower_than_the_rank_are_left_out() -> None:
    class Gated(Unknown):
        def __init__(self) -> None:
            super().__init__()
            for stage in self.stages:
                stage.add_module("narrow", nn.Linear(8, 1))

    assert not any("narrow" in name for name in adapted_by_peft(Gated(), TcurLoraConfig(r=2))[0])
    assert "narrow" in adapted_by_peft(Gated(), TcurLoraConfig(r=1))[1]


def test_t5_and_falcon_with_their_unknown_names_and_falcons_own_linear_layer() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "num_layers": 2, "num_heads": 2, "d_model": 8, "d_kv": 4, "d_ff": 12}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    layers, names = adapted_by_peft(t5, TcurLoraConfig(r=2))
    assert len(layers) == 2 * 6 + 2 * 10
    assert "EncDecAttention.q" in names
    sizes = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    assert len(adapted_by_peft(falcon, TcurLoraConfig(r=2))[0]) == 2 * 4
