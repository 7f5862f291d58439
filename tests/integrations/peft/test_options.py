"""Options that ``inject`` has too: dropout, a parameter budget, blocks, frequencies, activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear, calibrate

Same = Callable[[Tensor, Tensor], None]
Adapt = Callable[..., PeftModel]
MakeLlama = Callable[[], LlamaForCausalLM]

# As adapters were saved before these fields.
NEW = (
    *("dropout", "rank_stabilised", "budget", "stack_blocks", "frequencies", "calibration"),
    *("trainable_token_indices", "ensure_weight_tying", "layer_replication"),
)


def ranks(model: PeftModel, adapter: str = "default") -> dict[str, tuple[int, int]]:
    return {name: stack.rank for name, stack in model.base_model.stacks(adapter).items()}


@pytest.mark.parametrize("hooked", [False, True])
def test_in_training_the_adapter_reads_a_dropped_x_and_the_base_all_of_it(
    make_llama: MakeLlama, adapt: Adapt, hooked: bool
) -> None:
    """With the base product in the operator, and with the base layer called separately."""
    model = adapt(make_llama().double(), target_modules=["q_proj"], dropout=0.5)
    layer = next(module for module in model.modules() if isinstance(module, TcurLoraLinear)).train()
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x, change = torch.randn(4, 16, dtype=torch.float64), layer.get_delta_weight("default")
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    assert bool((dropped == 0).any())
    torch.testing.assert_close(y, x @ layer.weight.T + dropped @ change.T)


def test_nothing_is_dropped_in_evaluation_in_mixed_batches_and_where_merged(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same
) -> None:
    torch.manual_seed(1)
    plain = adapt(make_llama())
    torch.manual_seed(1)
    model = adapt(make_llama(), dropout=0.9)
    assert_same(model(tokens).logits, plain(tokens).logits)
    for names in (["default"] * 3, ["default", "__base__", "default"]):
        assert_same(model(tokens, adapter_names=names).logits, plain(tokens, adapter_names=names).logits)
    assert not torch.equal(model.train()(tokens).logits, plain(tokens).logits)
    for adapted in (model, plain):
        adapted.merge_adapter()
    assert_same(model(tokens).logits, plain(tokens).logits)


def test_two_active_adapters_drop_each_by_its_own_share(make_llama: MakeLlama, adapt: Adapt) -> None:
    model = adapt(make_llama(), target_modules=["q_proj"])
    model.add_adapter("second", TcurLoraConfig(r=3, target_modules=["q_proj"], init_weights=False, dropout=0.5))
    model.base_model.set_adapter(["default", "second"])
    layer = next(module for module in model.modules() if isinstance(module, TcurLoraLinear)).train()
    x = torch.randn(4, 16)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    undropped = layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(y, x @ undropped.T + dropped @ layer.get_delta_weight("second").T)


@pytest.mark.parametrize(
    "options",
    [{"budget": 150}, {"budget": 150, "frequencies": 1}, {"budget": 300, "stack_by": "role"}],
    ids=["by shape", "low frequencies", "by role"],
)
def test_a_budget_gives_the_ranks_that_it_gives_inject(
    make_llama: MakeLlama, adapt: Adapt, options: dict[str, Any]
) -> None:
    model, injected = adapt(make_llama(), **options), tcur.inject(make_llama(), tcur.TCURConfig(**options))
    assert ranks(model) == {name: stack.rank for name, stack in tcur.stacks(injected).items()}
    assert len(set(ranks(model).values())) > 1
    assert sum(stack.core.numel() for stack in model.base_model.stacks("default").values()) <= options["budget"]


def test_the_ranks_of_a_budget_are_saved_and_not_spread_again(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, tmp_path: Path
) -> None:
    model = adapt(make_llama(), budget=150, save_projection=True)
    config = model.peft_config["default"]
    assert config.budget is None
    assert config.rank_pattern[r"^model\.layers\.1\.mlp\.up_proj$"] == ranks(model)["32x16"][0]
    model.save_pretrained(tmp_path)

    def other() -> LlamaForCausalLM:
        base = make_llama()
        with torch.no_grad():
            base.model.layers[0].self_attn.q_proj.weight.mul_(100)
        return base

    assert ranks(adapt(other(), budget=150)) != ranks(model)
    for low_cpu_mem_usage in (True, False):
        loaded = PeftModel.from_pretrained(other(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert ranks(loaded) == ranks(model)
        loaded(tokens)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5, "rank_stabilised": True, "stack_blocks": 1},
        {"frequencies": 1, "save_projection": False},
        {"budget": 150, "save_projection": False},
    ],
    ids=["dropout, stabilised, blocks", "low frequencies", "a budget"],
)
def test_they_survive_saving_and_loading(
    make_llama: MakeLlama,
    tokens: Tensor,
    adapt: Adapt,
    assert_same: Same,
    tmp_path: Path,
    options: dict[str, Any],
    low_cpu_mem_usage: bool,
) -> None:
    model = adapt(make_llama(), **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same(loaded(tokens).logits, model(tokens).logits)
    for name in NEW:
        assert getattr(loaded.peft_config["default"], name) == getattr(model.peft_config["default"], name)
    stacks = loaded.base_model.stacks("default")
    for name, stack in model.base_model.stacks("default").items():
        loaded_options, options_ = stacks[name].options, stack.options
        assert (loaded_options.dropout, stacks[name].names) == (options_.dropout, stack.names)
        assert (loaded_options.frequencies, stacks[name].scale) == (options_.frequencies, stack.scale)


def test_a_configuration_saved_without_these_fields_loads(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    model = adapt(make_llama())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in NEW}))
    assert_same(PeftModel.from_pretrained(make_llama(), tmp_path).eval()(tokens).logits, model(tokens).logits)


@pytest.fixture
def by_activation(make_llama: MakeLlama, tokens: Tensor) -> TcurLoraConfig:
    config = TcurLoraConfig(r=2, selection="activation", init_weights=False)
    config.calibration = calibrate(make_llama(), config, [tokens])
    return config


def test_columns_by_activations_are_those_of_inject(
    make_llama: MakeLlama, tokens: Tensor, by_activation: TcurLoraConfig
) -> None:
    config = tcur.TCURConfig(rank=2, selection="activation")
    plain = make_llama()
    injected = tcur.inject(make_llama(), config, tcur.calibrate(plain, config, [tokens]))
    for name, stack in get_peft_model(make_llama(), by_activation).base_model.stacks("default").items():
        assert torch.equal(stack.columns, tcur.stacks(injected)[name].columns)
        assert torch.equal(stack.col, tcur.stacks(injected)[name].col)
    by_norm = tcur.stacks(tcur.inject(plain, tcur.TCURConfig(rank=2)))
    assert any(not torch.equal(s.columns, by_norm[name].columns) for name, s in tcur.stacks(injected).items())


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_an_adapter_by_activations_loads_without_its_inputs(
    make_llama: MakeLlama,
    tokens: Tensor,
    assert_same: Same,
    by_activation: TcurLoraConfig,
    tmp_path: Path,
    save_projection: bool,
    low_cpu_mem_usage: bool,
) -> None:
    by_activation.save_projection = save_projection
    model = get_peft_model(make_llama(), by_activation).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["calibration"] == {}
    assert PeftConfig.from_pretrained(tmp_path).selection == "activation"
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_same(loaded(tokens).logits, model(tokens).logits)


def test_inputs_are_those_of_the_base_whatever_adapters_it_has(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, by_activation: TcurLoraConfig
) -> None:
    model = adapt(make_llama())
    again = calibrate(model, by_activation, [tokens])
    assert by_activation.calibration is not None
    assert again.keys() == by_activation.calibration.keys()
    for name, found in again.items():
        assert_same(found, by_activation.calibration[name])
    assert by_activation.target_modules is None  # PEFT fills it in as the adapter is put on, and not before
    with pytest.raises(ValueError, match=r"target_modules 'nothing' match no module of LlamaForCausalLM"):
        calibrate(make_llama(), TcurLoraConfig(target_modules="nothing"), [tokens])


def test_layers_that_cannot_be_stacked_are_in_stacks_of_their_own(make_llama: MakeLlama, adapt: Adapt) -> None:
    """As with a device_map; here they have two dtypes."""

    def mixed() -> LlamaForCausalLM:
        model = make_llama()
        model.model.layers[1].to(torch.bfloat16)
        return model

    message = r"layers\.1\.self_attn\.q_proj is torch.bfloat16 on cpu.*stack_by='none', or stack_blocks=n"
    with pytest.raises(ValueError, match=message):
        adapt(mixed())
    for options in ({"stack_by": "none"}, {"stack_blocks": 1}):
        stacks = adapt(mixed(), **options).base_model.stacks("default")
        assert {stack.col.dtype for stack in stacks.values()} == {torch.float32, torch.bfloat16}


def test_replicated_layers_share_their_weights_and_have_slices_of_their_own(
    make_llama: MakeLlama, tokens: Tensor, adapt: Adapt, assert_same: Same, tmp_path: Path
) -> None:
    replication = [(0, 1), (0, 2), (1, 2)]
    model = adapt(make_llama(), layer_replication=replication)
    blocks = model.base_model.model.model.layers
    assert [blocks[i].mlp.up_proj.weight is blocks[j].mlp.up_proj.weight for i, j in ((0, 1), (1, 2), (2, 3))] == [
        True, False, True
    ]  # fmt: skip
    stack = model.base_model.stacks("default")["16x32"]
    assert stack.names == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    changes = stack.delta_weights()
    assert not torch.allclose(changes[0], changes[1])

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert_same(loaded(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    loaded.load_adapter(tmp_path, "again")
    assert len(loaded.base_model.model.model.layers) == 4
    for change in (loaded.merge_adapter, loaded.merge_and_unload):
        with pytest.raises(ValueError, match="cannot merge: replicated layers share one weight"):
            change()
    with pytest.raises(ValueError, match=r"layer_replication is None, expected \[\(0, 1\), \(0, 2\)"):
        loaded.add_adapter("other", TcurLoraConfig(r=2))


def test_a_saved_core_of_other_frequencies_is_refused(make_llama: MakeLlama, adapt: Adapt, tmp_path: Path) -> None:
    adapt(make_llama(), frequencies=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state["base_model.tcurlora_core.16x16"] = torch.zeros(3, 2, 2)
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"16x16.core: .*\[3, 2, 2\].*\[1, 2, 2\]"):
        PeftModel.from_pretrained(make_llama(), tmp_path)
