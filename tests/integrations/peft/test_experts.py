"""Experts in one 3-D parameter, named by PEFT's ``target_parameters``."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig

transformers = pytest.importorskip("transformers", minversion="5")

IDS = torch.arange(14).view(2, 7)
NAMES = ["mlp.experts.gate_up_proj", "experts.down_proj"]


def network(kind: str = "Mixtral", implementation: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, head_dim=4, num_local_experts=4,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_experts_implementation(implementation)
    return model


def fill(model: nn.Module, adapter: str = "default") -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if f"tcurlora_core.{adapter}." in name and name.endswith("core"):
            parameter.data.normal_(std=0.3)


@pytest.mark.parametrize(("kind", "transform"), [("Mixtral", "dft"), ("GptOss", "identity")])
def test_named_parameters_are_adapted_as_inject_adapts_them(kind: str, transform: str, tmp_path: Path) -> None:
    plain = network(kind)
    before = plain(IDS).logits
    config = TcurLoraConfig(r=2, transform=transform, target_parameters=NAMES)
    model = get_peft_model(copy.deepcopy(plain), config).eval()
    assert torch.equal(model(IDS).logits, before)
    fill(model)
    y = model(IDS).logits
    by_inject = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig(rank=2, transform=transform, target_modules=NAMES))
    stacks = {stack.names[0]: stack for stack in tcur.stacks(by_inject).values()}
    for stack in model.base_model.stacks("default").values():
        stacks[stack.names[0]].core.data.copy_(stack.core)
    assert torch.equal(by_inject(IDS).logits, y)
    y.square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(IDS).logits, y)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)
    model.merge_adapter()
    assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, y)
    merged = model.merge_and_unload()
    assert_close(merged(IDS).logits, y, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]


def test_the_default_adapts_the_experts_that_inject_adapts(tmp_path: Path) -> None:
    plain = network()
    model = get_peft_model(copy.deepcopy(plain), TcurLoraConfig(r=2)).eval()
    config = model.peft_config["default"]
    assert config.target_parameters == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    by_inject = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig(rank=2))
    trained = {name for stack in tcur.stacks(by_inject).values() for name in stack.names}
    assert {name for stack in model.base_model.stacks("default").values() for name in stack.names} == trained
    fill(model)
    y = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(IDS).logits, y)


def test_the_default_leaves_experts_out_where_they_are_excluded_or_an_option_cannot_hold_for_them() -> None:
    model = get_peft_model(network(), TcurLoraConfig(r=2, exclude_modules=["experts.down_proj"]))
    assert model.peft_config["default"].target_parameters == ["mlp.experts.gate_up_proj"]
    with pytest.warns(UserWarning, match="layers_to_transform holds for modules alone: the experts in model.layers.0"):
        model = get_peft_model(network(), TcurLoraConfig(r=2, layers_to_transform=[1]))
    assert model.peft_config["default"].target_parameters is None
    assert all("attn" in name for stack in model.base_model.stacks("default").values() for name in stack.names)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("transform", ["dft", "identity"])
def test_two_adapters_add_up(implementation: str, transform: str) -> None:
    options = {"transform": transform, "target_parameters": NAMES}
    model = get_peft_model(network(implementation=implementation), TcurLoraConfig(r=2, **options)).eval()
    model.add_adapter("b", TcurLoraConfig(r=3, target_modules=["q_proj"], **options))
    fill(model), fill(model, "b")
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    x, routes = torch.randn(3, 16), torch.tensor([[0, 1], [3, 0], [1, 0]])
    shares = torch.rand(3, 2)
    model.base_model.set_adapter(["default", "b"])
    found = experts(x, routes, shares)
    dense = {
        own: layer.held.weight + sum(layer.get_delta_weight(name) for name in ("default", "b"))
        for own, layer in experts.named_children()
        if own in ("gate_up_proj", "down_proj")
    }
    plain = network(implementation=implementation).get_submodule("model.layers.0.mlp.experts")
    assert_close(found, torch.func.functional_call(plain, dense, (x, routes, shares)), rtol=1e-4, atol=1e-5)
    model.delete_adapter("b")
    assert list(experts.down_proj.slices) == ["default"]


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target_parameters has 'experts.gate_proj', which names no parameter of Mix"):
        get_peft_model(network(), TcurLoraConfig(r=2, target_parameters=["experts.gate_proj"]))
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"names attention\.in_proj_weight; expected parameters with all experts"):
        get_peft_model(attention, TcurLoraConfig(r=2, target_parameters=["in_proj_weight"]))
    model = get_peft_model(network(), TcurLoraConfig(r=2, target_parameters=NAMES)).eval()
    with pytest.raises(ValueError, match="cannot pass adapter_names: the experts' tokens are no rows of the batch"):
        model(IDS, adapter_names=["default", "__base__"])
    fill(model)
    with pytest.raises(ValueError, match=r"experts\.down_proj is a parameter|experts\.gate_up_proj is a parameter"):
        tcur.to_lora(model, tmp_path / "lora")
