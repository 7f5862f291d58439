"""Errors name what was found and what was expected, and leave the model unchanged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank is 0, expected a positive whole number"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] is -1, expected a positive whole number"),
        ({"rank_pattern": {"q_proj": 1}, "budget": 99}, r"budget is 99 and rank_pattern .*: expected one of the two"),
        ({"budget": 0}, "budget is 0, expected a positive whole number"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a number from 0 to below 1"),
        ({"frequencies": 2, "transform": "dct"}, "found transform 'dct'"),
        ({"rank_stabilised": True, "scale": 1.0}, "found scale 1.0"),
        ({"stack_blocks": 2, "stack_by": "none"}, "found stack_by 'none'"),
        ({"alpha": float("nan")}, "alpha is nan, expected a finite number"),
        ({"selection": "best"}, "selection is 'best', expected one of 'norm'"),
        ({"bias": "some"}, "bias is 'some', expected one of 'none', 'all', 'tcurlora_only'"),
        ({"layers_pattern": "layers"}, "layers_pattern is given, expected layers_to_transform"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "expected a list of names"),
    ],
)
def test_of_the_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TcurLoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q_prj"]}, ValueError, "q_prj"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "model.embed_tokens is a Embedding, expected a linear layer"),
        ({"r": 9}, ValueError, r"8x16 .*rank \(c, r\) = \(9, 9\) does not fit 8 x 16 weights"),
        ({"budget": 4}, ValueError, "budget is 4 parameters, expected at least 14"),
        ({"selection": "activation"}, ValueError, "stack 16x16: selection is 'activation' and calibration None"),
        ({"calibration": {}, "selection": "activation", "r": 99}, ValueError, "does not fit"),
        ({"split_fused": {"q_proj": 3}}, ValueError, "q_proj: 16 output features do not split into 3"),
        (
            {"rank_pattern": {"q_proj": 4}},
            ValueError,
            r"q_proj rank 4 and model.layers.0.self_attn.o_proj rank 2, expected one for both: .* stack 16x16",
        ),
        (
            {"alpha_pattern": {"v_proj": 4.0}},
            ValueError,
            r"k_proj alpha 1.0 and model.layers.0.self_attn.v_proj alpha 4.0",
        ),
    ],
)
def test_of_an_adapter_leave_the_model_as_it_was(
    make_llama: Callable[[], LlamaForCausalLM], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, TcurLoraConfig(**({"r": 2} | options)))
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())

    adapted = get_peft_model(model, TcurLoraConfig(r=2))
    state = adapted.state_dict()
    with pytest.raises(error, match=message):
        adapted.add_adapter("second", TcurLoraConfig(**({"r": 2} | options)))
    assert adapted.state_dict().keys() == state.keys()
    assert list(adapted.peft_config) == ["default"]


def test_of_weights_that_are_not_finite(make_llama: Callable[[], LlamaForCausalLM]) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: 1 of 512 weights are NaN"):
        get_peft_model(model, TcurLoraConfig(r=2))


def test_of_a_base_without_values(make_llama: Callable[[], LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match=r"stack 16x16 .*meta device: rows and columns are chosen from real values"):
        get_peft_model(make_llama().to("meta"), TcurLoraConfig(r=2))


def test_of_modules_that_are_not_called() -> None:
    """``nn.MultiheadAttention`` does not call its out_proj: an adapter there would silently have no effect."""
    with pytest.raises(TypeError, match=r"out_proj cannot be adapted: nn\.MultiheadAttention reads its weight"):
        get_peft_model(nn.MultiheadAttention(8, 2), TcurLoraConfig(r=1, target_modules=["out_proj"]))


def test_of_a_model_without_the_default_names() -> None:
    reason = "the default adapts none of the modules of Sequential; 0 is left out: outside repeated blocks"
    with pytest.raises(ValueError, match=f"specify `target_modules`: {reason}"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), TcurLoraConfig(r=1))


def test_of_layers_whose_parent_reads_their_weights_with_what_adapts_them() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"layers\.0\.linear1 is left out: its parent, .*use tcurlora_ext\.inject"):
        get_peft_model(encoder, TcurLoraConfig(r=2))


@pytest.mark.parametrize(
    ("names", "training", "message"),
    [
        (["default"], False, "should be the same as the number of inputs, but got 1 and 3"),
        (
            ["default", "defualt", "__base__"],
            False,
            r"adapter\(s\): defualt; expected default or __base__",
        ),
        (["default"] * 3, True, "training mode"),
    ],
)
def test_of_mixed_batches(
    make_llama: Callable[[], LlamaForCausalLM],
    adapt: Callable[..., PeftModel],
    tokens: torch.Tensor,
    names: list[str],
    training: bool,
    message: str,
) -> None:
    model = adapt(make_llama()).train(training)
    with pytest.raises(ValueError, match=message):
        model(tokens, adapter_names=names)
    hooks = [module._forward_pre_hooks for module in model.modules() if isinstance(module, TcurLoraLinear)]
    assert not any(hooks)


def test_of_mixed_batches_over_merged_weights(
    make_llama: Callable[[], LlamaForCausalLM], adapt: Callable[..., PeftModel], tokens: torch.Tensor
) -> None:
    model = adapt(make_llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(tokens, adapter_names=["default"] * 3)


def test_of_peft_mixed_model(make_llama: Callable[[], LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="'TCURLORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(make_llama(), TcurLoraConfig(r=2), mixed=True)


def test_lora_names_are_explained() -> None:
    with pytest.raises(TypeError, match="lora_alpha is an option of LoRA; here it is alpha"):
        TcurLoraConfig(lora_alpha=16)  # type: ignore[call-arg]
    with pytest.warns(UserWarning, match="alpha is 16"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), TcurLoraConfig(alpha=16, r=2, target_modules=["0"]))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)


def test_all_linear_leaves_out_what_cannot_be_adapted_and_says_why() -> None:
    with pytest.warns(UserWarning, match=r"leaves out attention\.out_proj, encoder.* \(4 of 5 linear"):
        model = get_peft_model(Attending(), TcurLoraConfig(r=2, target_modules="all-linear"))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    assert adapted == ["base_model.model.linear"]


def test_an_encoder_layer_that_bypasses_its_linear_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"encoder\.linear1: its parent, an nn\.TransformerEncoderLayer, .*use tcurlora_ext\.inject"
    ):
        get_peft_model(Attending(), TcurLoraConfig(r=2, target_modules=["linear1"]))


def test_names_that_nothing_has_are_named() -> None:
    with pytest.warns(UserWarning, match="target_modules has 'lin', which no module of Attending is called"):
        get_peft_model(Attending(), TcurLoraConfig(r=2, target_modules=["linear", "lin"]))


def test_a_weight_made_by_a_hook_is_refused() -> None:
    model = Attending()
    nn.utils.spectral_norm(model.linear)
    with pytest.raises(TypeError, match="linear cannot be adapted: its weight is made anew in each call"):
        get_peft_model(model, TcurLoraConfig(r=2, target_modules=["linear"]))


def test_a_model_that_inject_has_adapted_is_refused() -> None:
    model = tcur.inject(Attending(), tcur.TCURConfig(rank=2, target_modules=["linear"]))
    for target in ("linear", "head"):
        model.head = nn.Linear(8, 2)
        with pytest.raises(ValueError, match=r"linear of Attending is adapted already; call remove\(model\) first"):
            get_peft_model(model, TcurLoraConfig(r=2, target_modules=[target]))
    get_peft_model(tcur.remove(tcur.merge(model)), TcurLoraConfig(r=2, target_modules=["linear"]))


@pytest.mark.parametrize(("entry", "near"), [("haed", "; near it: head$"), ("nothing", "$")])
def test_modules_to_save_that_name_nothing_are_refused(entry: str, near: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    config = TcurLoraConfig(r=2, target_modules=["linear"], modules_to_save=["head", entry])
    message = f"modules_to_save has '{entry}', which no module of ModuleDict is called{near}"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert isinstance(model["linear"], nn.Linear)
    # an adapter that was saved with such an entry still loads
    config.modules_to_save = ["head"]
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"modules_to_save": ["head", entry]}))
    with pytest.warns(UserWarning, match=message):
        PeftModel.from_pretrained(model, tmp_path)


def test_the_heads_that_peft_itself_names_for_a_task_are_no_error() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))
    model = get_peft_model(base, TcurLoraConfig(r=2, task_type="SEQ_CLS"))
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
