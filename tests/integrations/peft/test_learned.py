"""Learned factors in PEFT: learned on its targets, saved in few bytes, shared by adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig, hotswap_adapter, learn_factors

MakeLlama = Callable[[], LlamaForCausalLM]
OWN: dict[str, Any] = {"stack_by": "none", "transform": "identity"}
FORMS: dict[str, dict[str, Any]] = {
    "own cores": OWN | {"factors": "learned"},
    "coupled": {"factors": "learned"},
    "lowest frequencies": {"factors": "learned", "frequencies": 2},
    "rows alone, own cores": OWN | {"factors": "learned_rows"},
    "rows alone, orthonormal": OWN | {"factors": "learned_rows", "orthonormal": True},
}
SEED_TOKENS = torch.arange(3, 33).reshape(3, 10)


def step(model: nn.Module) -> Tensor:
    return model(input_ids=SEED_TOKENS, labels=SEED_TOKENS).loss


def config_of(model: nn.Module, subspace: tcur.Subspace | None = None, **options: Any) -> TcurLoraConfig:
    """A configuration with a subspace, learned on the model unless it is given."""
    options = {"r": 2, "factors": "learned", "init_weights": False, "task_type": "CAUSAL_LM"} | options
    config = TcurLoraConfig(**options)
    config.subspace = subspace or learn_factors(model, config, step, steps=3)
    return config


@pytest.fixture
def subspace(make_llama: MakeLlama) -> tcur.Subspace:
    return config_of(make_llama()).subspace


@pytest.fixture(params=FORMS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FORMS[request.param]


def another(subspace: tcur.Subspace) -> tcur.Subspace:
    """A subspace of another digest."""
    return tcur.Subspace(subspace.config, subspace.bits, subspace.stacks, {"another": "note"})


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


# -- learning and making ----------------------------------------------------------------------------------------------


def test_learned_on_the_modules_that_peft_names(make_llama: MakeLlama) -> None:
    base = make_llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    layers = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "rank_pattern": {"q_proj": 3}}
    config = config_of(base, **OWN, **layers)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    found = {stack.names[0]: stack.rank for stack in config.subspace.stacks.values()}
    assert found == {"model.layers.1.self_attn.q_proj": (3, 3), "model.layers.1.mlp.down_proj": (2, 2)}
    model = get_peft_model(base, config)
    assert {s.names[0]: s.rank for s in model.base_model.stacks("default").values()} == found
    by_inject = tcur.inject(make_llama(), subspace=config.subspace)
    assert {s.names[0] for s in tcur.stacks(by_inject).values()} == set(found)


def test_learned_on_the_base_of_a_peft_model(make_llama: MakeLlama, subspace: tcur.Subspace) -> None:
    model = get_peft_model(make_llama(), TcurLoraConfig(r=2, init_weights=False, task_type="CAUSAL_LM"))
    again = learn_factors(model, TcurLoraConfig(r=2, factors="learned"), step, steps=3)
    assert all(torch.equal(tensor, subspace.tensors()[name]) for name, tensor in again.tensors().items())


def test_put_back_keeps_what_peft_has_frozen(make_llama: MakeLlama) -> None:
    """The warm-up of a PeftModel's base leaves the adapters' cores trainable, and disabled adapters enabled."""
    model = get_peft_model(make_llama(), TcurLoraConfig(r=2, task_type="CAUSAL_LM"))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    learn_factors(model, TcurLoraConfig(r=2, factors="learned"), step, steps=1)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.active_adapters == ["default"]


def test_the_factors_are_those_of_the_subspace_and_the_core_trains(
    make_llama: MakeLlama, options: dict[str, Any], tokens: Tensor
) -> None:
    base = make_llama()
    model = get_peft_model(base, config_of(base, **options))
    injected = tcur.inject(make_llama(), subspace=model.peft_config["default"].subspace)
    for theirs in tcur.stacks(injected).values():
        own = next(s for s in model.base_model.stacks("default").values() if s.names == theirs.names)
        assert torch.equal(own.row, theirs.row)
        assert torch.equal(own.col, theirs.col)
        assert own.rides == theirs.rides == (options["factors"] == "learned_rows")
        own.core.data = theirs.core.data = torch.randn(own.core.shape)
    torch.testing.assert_close(logits(model, tokens), logits(injected, tokens), rtol=1e-5, atol=1e-6)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained == list(model.base_model.tcurlora_core.parameters())
    assert all(bool(p.grad.any()) for p in trained)


def test_a_subspace_by_the_path_of_its_file(make_llama: MakeLlama, subspace: tcur.Subspace, tmp_path: Path) -> None:
    path = str(subspace.save(tmp_path / "subspace.safetensors"))
    model = get_peft_model(make_llama(), TcurLoraConfig(r=2, factors="learned", subspace=path))
    assert model.base_model.subspaces["default"].digest == subspace.digest
    with pytest.raises(FileNotFoundError, match="no such file of a subspace"):
        TcurLoraConfig(factors="learned", subspace="missing.safetensors")


def test_a_subspace_is_required_for_learned_factors_and_refused_otherwise(
    make_llama: MakeLlama, subspace: tcur.Subspace
) -> None:
    with pytest.raises(ValueError, match="subspace None, expected the result of learn_factors"):
        get_peft_model(make_llama(), TcurLoraConfig(factors="learned"))
    with pytest.raises(ValueError, match="a subspace is given and factors is 'weights'"):
        TcurLoraConfig(subspace=subspace)
    with pytest.raises(ValueError, match="transform is 'dct', expected 'dft'"):
        get_peft_model(make_llama(), TcurLoraConfig(r=2, factors="learned", transform="dct", subspace=subspace))
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="learned on other base weights"):
        get_peft_model(other, TcurLoraConfig(r=2, factors="learned", subspace=subspace))


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_checkpoint_loads_alone(
    make_llama: MakeLlama,
    options: dict[str, Any],
    tokens: Tensor,
    tmp_path: Path,
    low_cpu_mem_usage: bool,
    safe_serialization: bool,
) -> None:
    base = make_llama()
    model = get_peft_model(base, config_of(base, **options))
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded, tokens), expected)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]
    digest = model.base_model.subspaces["default"].digest
    assert loaded.peft_config["default"].subspace == digest
    assert loaded.base_model.subspaces["default"].digest == digest
    loaded.save_pretrained(tmp_path / "again")  # saved again, it still holds all
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, tokens), expected)


def test_what_a_checkpoint_holds(make_llama: MakeLlama, subspace: tcur.Subspace, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), config_of(make_llama(), subspace))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kinds, stacks = ("core", "rows", "columns", "scale", "left", "right"), tuple(subspace.stacks)
    keys = {f"base_model.tcurlora_{kind}.{stack}" for kind in kinds for stack in stacks}
    assert set(saved) == {*keys, "base_model.tcurlora_subspace"}
    for name, coded in subspace.tensors().items():
        side, _, stack = name.partition(".")
        assert torch.equal(saved[f"base_model.tcurlora_{side}.{stack}"], coded)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["subspace"] == subspace.digest
    assert TcurLoraConfig.from_pretrained(tmp_path).subspace == subspace.digest

    model.peft_config["default"].save_projection = False
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    keys = {f"base_model.tcurlora_{kind}.{stack}" for kind in kinds[:4] for stack in stacks}
    assert set(saved) == {*keys, "base_model.tcurlora_subspace"}
    assert json.loads(bytes(saved["base_model.tcurlora_subspace"].tolist())) == {"digest": subspace.digest}


def test_a_checkpoint_without_the_subspace_needs_it(
    make_llama: MakeLlama, subspace: tcur.Subspace, tokens: Tensor, tmp_path: Path
) -> None:
    model = get_peft_model(make_llama(), config_of(make_llama(), subspace, save_projection=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{subspace.digest[:12]}, which is not in the checkpoint; expected it in the"):
        PeftModel.from_pretrained(make_llama(), tmp_path)
    config = TcurLoraConfig.from_pretrained(tmp_path)
    config.subspace = subspace
    for low_cpu_mem_usage in (True, False):
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path, config=config, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    loaded.load_adapter(tmp_path, "second")  # the model knows the subspace
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    config.subspace = another(subspace)
    with pytest.raises(
        ValueError, match=f"over the subspace {subspace.digest[:12]}, found {config.subspace.digest[:12]}"
    ):
        PeftModel.from_pretrained(make_llama(), tmp_path, config=config)


def test_a_new_adapter_with_the_configuration_of_a_checkpoint_says_that_it_has_no_factors(
    make_llama: MakeLlama, subspace: tcur.Subspace, tokens: Tensor, tmp_path: Path
) -> None:
    get_peft_model(make_llama(), config_of(make_llama(), subspace)).save_pretrained(tmp_path)
    model = get_peft_model(make_llama(), TcurLoraConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=f"default has no factors yet: .* the digest {subspace.digest[:12]}"):
        model(tokens)
    with pytest.raises(ValueError, match="has no factors yet"):
        model.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("damage", ["directions", "description"])
def test_a_damaged_checkpoint_is_refused(
    make_llama: MakeLlama, subspace: tcur.Subspace, tmp_path: Path, damage: str
) -> None:
    get_peft_model(make_llama(), config_of(make_llama(), subspace)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    if damage == "directions":
        saved["base_model.tcurlora_left.16x16"][0] ^= 1
    else:
        saved["base_model.tcurlora_subspace"] = saved["base_model.tcurlora_subspace"][1:].clone()
    save_file(saved, path)
    with pytest.raises(ValueError, match="damaged"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


def test_other_base_weights_are_refused(make_llama: MakeLlama, subspace: tcur.Subspace, tmp_path: Path) -> None:
    get_peft_model(make_llama(), config_of(make_llama(), subspace)).save_pretrained(tmp_path)
    other = make_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="learned on other base weights"):
        PeftModel.from_pretrained(other, tmp_path)


def test_onto_a_base_on_meta(make_llama: MakeLlama, subspace: tcur.Subspace, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), config_of(make_llama(), subspace))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama().to("meta"), tmp_path, low_cpu_mem_usage=True)
    for name, stack in loaded.base_model.stacks("default").items():
        assert torch.equal(stack.row, model.base_model.stacks("default")[name].row)


# -- several adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_adapters_over_one_subspace_share_its_factors(
    make_llama: MakeLlama, subspace: tcur.Subspace, tokens: Tensor, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    model = get_peft_model(make_llama(), config_of(make_llama(), subspace))
    model.add_adapter("second", config_of(make_llama(), subspace))
    model.save_pretrained(tmp_path)
    first, second = (model.base_model.stacks(name) for name in ("default", "second"))
    assert all(first[name].row is second[name].row and first[name].col is second[name].col for name in first)

    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    first, second = (loaded.base_model.stacks(name) for name in ("default", "second"))
    assert all(first[name].row is second[name].row and first[name].col is second[name].col for name in first)
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))

    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, logits(make_llama(), tokens))
    rows = model(tokens, adapter_names=["second", "__base__", "default"]).logits
    torch.testing.assert_close(rows[1:2], logits(make_llama(), tokens[1:2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[:1], logits(model, tokens[:1]), rtol=1e-4, atol=1e-5)
    expected = logits(model, tokens)
    model.delete_adapter("default")
    assert list(model.base_model.subspaces) == ["second"]
    assert torch.equal(logits(model, tokens), expected)


def test_merged_and_unmerged(make_llama: MakeLlama, options: dict[str, Any], tokens: Tensor) -> None:
    base = make_llama()
    model = get_peft_model(base, config_of(base, **options))
    expected = logits(model, tokens)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=1e-4, atol=1e-5)


def test_hotswap_over_the_same_subspace(
    make_llama: MakeLlama, options: dict[str, Any], tokens: Tensor, tmp_path: Path
) -> None:
    base = make_llama()
    config = config_of(base, **options)
    first, second = get_peft_model(make_llama(), config), get_peft_model(make_llama(), config)
    with torch.no_grad():
        for stack in second.base_model.stacks("default").values():
            stack.core.mul_(-2)
    for save_projection in (True, False):
        second.peft_config["default"].save_projection = save_projection
        second.save_pretrained(tmp_path)
        fresh = get_peft_model(make_llama(), config)
        memory = [p.data_ptr() for p in fresh.parameters()]
        hotswap_adapter(fresh, str(tmp_path), "default")
        assert [p.data_ptr() for p in fresh.parameters()] == memory
        torch.testing.assert_close(logits(fresh, tokens), logits(second, tokens), rtol=1e-5, atol=1e-6)
    other = another(config.subspace)
    third = get_peft_model(make_llama(), config_of(base, other, **options))
    before = logits(third, tokens)
    with pytest.raises(ValueError, match=f"the subspace is {other.digest[:12]} in adapter default and"):
        hotswap_adapter(third, str(tmp_path), "default")
    assert torch.equal(logits(third, tokens), before)
    assert not torch.equal(logits(first, tokens), logits(second, tokens))


@torch.no_grad()
def test_weighted_sums(make_llama: MakeLlama, subspace: tcur.Subspace, tokens: Tensor, tmp_path: Path) -> None:
    model = get_peft_model(make_llama(), config_of(make_llama(), subspace))
    model.add_adapter("second", config_of(make_llama(), subspace))
    model.add_weighted_adapter(["default", "second"], [0.7, -0.3], "sum")
    deltas = [
        sum(s.delta_weights() for s in model.base_model.stacks(name).values() if s.names[0].endswith("down_proj"))
        for name in ("default", "second", "sum")
    ]
    torch.testing.assert_close(deltas[2], 0.7 * deltas[0] - 0.3 * deltas[1], rtol=1e-4, atol=1e-6)
    stacks = [model.base_model.stacks(name)["16x16"] for name in ("default", "sum")]
    assert stacks[0].row is stacks[1].row
    model.set_adapter("sum")
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path / "sum"), tokens), expected)
    with pytest.raises(ValueError, match="default has learned factors, whose sums are 'linear'"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "cat", combination_type="cat")
    model.add_adapter("plain", TcurLoraConfig(r=2))
    with pytest.raises(ValueError, match="factors is learned in adapter default and weights in plain"):
        model.add_weighted_adapter(["default", "plain"], [1, 1], "mixed")
    other = another(subspace)
    model.add_adapter("other", config_of(make_llama(), other))
    with pytest.raises(
        ValueError, match=f"subspace is {subspace.digest[:12]} in adapter default and {other.digest[:12]}"
    ):
        model.add_weighted_adapter(["default", "other"], [1, 1], "mixed")


def test_as_a_lora_adapter(make_llama: MakeLlama, options: dict[str, Any], tokens: Tensor, tmp_path: Path) -> None:
    base = make_llama()
    model = get_peft_model(base, config_of(base, **options))
    tcur.to_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)
    if options["factors"] == "learned" and "stack_by" in options:
        assert loaded.peft_config["default"].r == 2
