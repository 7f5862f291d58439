"""Adapters on a model: what trains, what they compute, several adapters, removing them."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR
from peft import PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear
from tcurlora_ext.integrations.peft.registration import register

Same = Callable[[Tensor, Tensor], None]
Adapt = Callable[..., PeftModel]
MakeLlama = Callable[[], LlamaForCausalLM]
MakeUNETR = Callable[[], UNETR]


def layers(model: nn.Module) -> dict[str, TcurLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TcurLoraLinear)}


def test_the_method_is_known_to_peft_and_its_type_survives_pickle_and_json() -> None:
    register()
    register()
    assert pickle.loads(pickle.dumps(PeftType.TCURLORA)) is PeftType.TCURLORA is PeftType("TCURLORA")
    assert json.dumps(PeftType.TCURLORA) == '"TCURLORA"'
    assert copy.deepcopy(PeftType.TCURLORA) is PeftType.TCURLORA
    assert PeftType.TCURLORA in list(PeftType)


def test_the_package_does_not_import_peft() -> None:
    code = "import sys, tcurlora_ext; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_fresh_adapter_changes_nothing_and_trains_only_its_cores(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same
) -> None:
    model = adapt(make_llama(), init_weights=True)
    assert_same(model(tokens).logits, make_llama()(tokens).logits)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    cores = {f"base_model.tcurlora_core.default.{stack}.core" for stack in ("16x16", "8x16", "32x16", "16x32")}
    assert trained == cores
    model(tokens).logits.square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options",
    [{}, {"rank_stabilised": True, "stack_blocks": 2}, {"frequencies": 1, "alpha": 2.0}],
    ids=["default", "stabilised, blocks", "low frequencies"],
)
def test_it_computes_what_inject_computes(
    make_unetr: MakeUNETR, make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, options: dict[str, Any]
) -> None:
    volume = torch.randn(1, 1, 16, 16, 16)
    for make, x in ((make_unetr, volume), (make_llama, tokens)):
        through_peft, injected = adapt(make(), **options), tcur.inject(make(), tcur.TCURConfig(rank=2, **options))
        for name, stack in through_peft.base_model.stacks("default").items():
            tcur.stacks(injected)[name].set_core_slices(stack.core_slices().detach())
        found, expected = through_peft(x), injected(x)
        if make is make_llama:
            found, expected = found.logits, expected.logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cores_are_float32_over_a_half_precision_base(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, dtype: torch.dtype
) -> None:
    model = adapt(make_llama().to(dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(tokens).logits.dtype == dtype
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_operator_computes_base_and_adapter_unless_the_base_layer_does_more(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(make_llama())
    fused: list[tcur.TCURStack] = []
    operator = tcur.TCURStack.adapt
    monkeypatch.setattr(tcur.TCURStack, "adapt", lambda stack, *rest: fused.append(stack) or operator(stack, *rest))
    expected = model(tokens).logits
    assert len(fused) == len(layers(model)) == 14

    fused.clear()
    called: list[str] = []
    for name, layer in layers(model).items():
        layer.base_layer.register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)
    assert sorted(called) == sorted(layers(model))
    assert not fused


def test_gradients_are_those_of_the_dense_delta(make_llama: MakeLlama, adapt: Adapt) -> None:
    """With the base product in the operator, and with the base layer called separately."""
    model = adapt(make_llama().double(), target_modules=["q_proj", "o_proj"])
    layer = next(iter(layers(model).values()))
    core, x = layer.tcurlora_core["default"].core, torch.randn(7, 16, dtype=torch.float64)
    change = layer.slices["default"].delta_weight(torch.float64)
    expected = torch.autograd.grad((x @ (layer.weight + change).T).square().sum(), core)[0]
    for hook in (None, lambda *_: None):
        if hook is not None:
            layer.base_layer.register_forward_hook(hook)
        found = torch.autograd.grad(layer(x).square().sum(), core)[0]
        torch.testing.assert_close(found, expected)


def test_several_adapters(make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same) -> None:
    model = adapt(make_llama(), target_modules=["q_proj", "k_proj"])
    first = model(tokens).logits
    model.add_adapter("second", TcurLoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_weights=False))
    assert_same(model(tokens).logits, first)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}

    model.set_adapter("second")
    second = model(tokens).logits
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert_same(model(tokens).logits, make_llama()(tokens).logits)

    model.base_model.set_adapter(["default", "second"])
    q_proj = layers(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 16)
    both = q_proj.weight + q_proj.get_delta_weight("default") + q_proj.get_delta_weight("second")
    torch.testing.assert_close(q_proj(x), x @ both.T)

    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if "second" in name]
    assert_same(model(tokens).logits, first)


def test_adapters_that_chose_the_same_indices_hold_c_and_r_once(make_llama: MakeLlama, adapt: Adapt) -> None:
    model = adapt(make_llama())
    model.add_adapter("same", TcurLoraConfig(r=2))
    model.add_adapter("other", TcurLoraConfig(r=2, selection="uniform"))
    default, same, other = (model.base_model.stacks(name)["16x16"] for name in ("default", "same", "other"))
    assert same.col is default.col
    assert same.row is default.row
    assert other.col is not default.col

    state = model.state_dict()
    kept = default.col.clone()
    prefix = "base_model.tcurlora_core.same.16x16."
    model.load_state_dict({prefix + "col": state[prefix + "col"] + 1}, strict=False)
    assert torch.equal(default.col, kept)
    assert torch.equal(same.col, kept + 1)


def test_status_says_what_there_is(make_llama: MakeLlama, adapt: Adapt) -> None:
    model = adapt(make_llama())
    model.add_adapter("second", TcurLoraConfig(r=3, target_modules=["down_proj"]))
    model.merge_adapter()
    status = model.get_model_status()
    assert status.peft_types == {"default": "TCURLORA", "second": "TCURLORA"}
    assert status.available_adapters == ["default", "second"]
    assert (status.active_adapters, status.merged_adapters) == (["default"], ["default"])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    assert (status.num_adapter_layers, status.trainable_params) == (14, (3 * 4 + 2) * 2 * 2)


def test_copies_are_models_of_their_own(make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same) -> None:
    model = adapt(make_llama())
    copied = copy.deepcopy(model)
    assert_same(copied(tokens).logits, model(tokens).logits)
    before = model(tokens).logits
    for p in copied.parameters():
        p.data.zero_()
    assert_same(model(tokens).logits, before)


def test_it_compiles_to_one_graph(make_llama: MakeLlama, tokens: Tensor, adapt: Adapt) -> None:
    model = adapt(make_llama())
    model.add_adapter("second", TcurLoraConfig(r=3, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = compiled(input_ids=tokens).logits, model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    cores = [p for p in model.parameters() if p.requires_grad]
    for here, there in zip(
        torch.autograd.grad(found.square().sum(), cores),
        torch.autograd.grad(expected.square().sum(), cores),
        strict=True,
    ):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


def test_unload_gives_the_base_back(make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same) -> None:
    plain = adapt(make_llama()).unload()
    assert not layers(plain)
    assert_same(plain(tokens).logits, make_llama()(tokens).logits)


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({}, 14),
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": r".*\.1\.mlp\..*_proj"}, 3),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, 7),
    ],
)
def test_which_layers_are_adapted(make_llama: MakeLlama, adapt: Adapt, options: dict[str, Any], adapted: int) -> None:
    assert len(layers(adapt(make_llama(), **options))) == adapted


def test_patterns_give_a_stack_its_own_rank_and_alpha(make_llama: MakeLlama, adapt: Adapt) -> None:
    plain = adapt(make_llama()).base_model.stacks("default")
    model = adapt(
        make_llama(), rank_pattern={"down_proj": (3, 4)}, alpha_pattern={r"layers\.\d\.self_attn\.[kv]_proj": 3.0}
    )
    stacks = model.base_model.stacks("default")
    assert {name: stack.rank for name, stack in stacks.items()} == {
        "16x16": (2, 2), "8x16": (2, 2), "32x16": (2, 2), "16x32": (3, 4)
    }  # fmt: skip
    assert stacks["8x16"].scale == pytest.approx(3 * plain["8x16"].scale)
    assert stacks["16x16"].scale == plain["16x16"].scale


def test_bias_trains_where_asked_for(make_llama: MakeLlama) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(network, TcurLoraConfig(r=1, target_modules=["0"], bias="tcurlora_only"))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "bias" in n] == [
        "base_model.model.0.base_layer.bias"
    ]


def test_direct_injection_is_refused_for_it_would_lose_the_cores(make_llama: MakeLlama) -> None:
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(TcurLoraConfig(r=2), make_llama())
