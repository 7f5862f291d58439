"""Loading adapter files onto models: equal bit for bit, or an error and nothing changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURLayer

CONFIGS = {
    "default": {},
    "pair of ranks": {"rank": (3, 2)},
    "raw": {"scale": 1.0},
    "dct": {"transform": "dct"},
    "identity": {"transform": "identity"},
    "slice": {"core_domain": "slice"},
    "all": {"trainable": "all"},
    "role": {"stack_by": "role"},
    "none": {"stack_by": "none"},
    "function": {"stack_by": lambda name, module: tuple(module.weight.shape)},
    "sampled": {"selection": "norm-sampled", "seed": 3},
    "unsplit": {"split_fused": {}},
}


def learn(model: nn.Module, x: Tensor) -> None:
    """Train for a few steps, so that all trained parameters change."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("onto_adapted", [False, True], ids=["plain", "adapted"])
def test_save_and_load_give_the_output_bit_for_bit(
    network: Any, x: Tensor, tmp_path: Path, options: dict[str, Any], onto_adapted: bool
) -> None:
    other = copy.deepcopy(network)
    config = tcur.TCURConfig(**{"rank": 2} | options)
    tcur.inject(network, config)
    tcur.unfreeze(network, ["head", "norm"])
    learn(network.train(), x)
    network.eval()
    tcur.save_adapter(network, tmp_path)
    if onto_adapted:
        tcur.inject(other, config)
    assert tcur.load_adapter(other, tmp_path) is other
    other.eval()
    assert torch.equal(other(x), network(x))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in network.named_parameters() if p.requires_grad
    }
    for name, stack in tcur.stacks(network).items():
        twin = tcur.stacks(other)[name]
        assert (twin.names, twin.scale, twin.normalised) == (stack.names, stack.scale, stack.normalised)
        assert (twin.row_scores, twin.column_scores) == (stack.row_scores, stack.column_scores)
    again = tcur.save_adapter(other, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "adapter.safetensors").read_bytes() or callable(config.stack_by)


def test_an_adapted_model_keeps_its_parameter_objects(
    network: Any, config: tcur.TCURConfig, train: Any, tmp_path: Path
) -> None:
    """An optimizer created before loading still trains them."""
    tcur.save_adapter(train(tcur.inject(network, config)), tmp_path)
    values = {name: stack.core.detach().clone() for name, stack in tcur.stacks(network).items()}
    parameters = dict(network.named_parameters())
    train(network)
    tcur.load_adapter(network, tmp_path)
    assert all(parameters[name] is p for name, p in network.named_parameters())
    for name, stack in tcur.stacks(network).items():
        assert torch.equal(stack.core, values[name])


@pytest.fixture
def saved(adapted: Any, tmp_path: Path) -> Path:
    return tcur.save_adapter(adapted, tmp_path / "saved.safetensors")


@pytest.fixture
def base(adapted: Any) -> Any:
    """A model without adapter, with the weights on which the file was trained."""
    return tcur.remove(copy.deepcopy(adapted)).requires_grad_(True)


def refused(model: nn.Module, path: Path, message: str, state_of: Any, assert_unchanged: Any) -> None:
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        tcur.load_adapter(model, path)
    assert_unchanged(model, before)


def test_one_changed_weight_is_refused_by_name(base: Any, saved: Path, state_of: Any, assert_unchanged: Any) -> None:
    with torch.no_grad():
        base.blocks[1].attn.qkv.weight[9, 3] *= 1.001
    message = r"saved\.safetensors: trained on other base weights: 1 of 8 slices of stack 8x8 differ, first blocks\.1"
    refused(base, saved, message + r"\.attn\.qkv\[1\].*include_factors=True", state_of, assert_unchanged)


def test_other_base_weights_are_refused_also_by_an_adapted_model(
    make_network: Any, config: tcur.TCURConfig, saved: Path, state_of: Any, assert_unchanged: Any
) -> None:
    other = tcur.inject(make_network(), config)
    refused(other, saved, "trained on other base weights: 8 of 8", state_of, assert_unchanged)


def test_with_its_factors_a_file_loads_onto_other_base_weights(adapted: Any, make_network: Any, tmp_path: Path) -> None:
    tcur.save_adapter(adapted, tmp_path, include_factors=True)
    other = tcur.load_adapter(make_network(), tmp_path)
    for name, stack in tcur.stacks(adapted).items():
        assert torch.equal(tcur.stacks(other)[name].delta_weights(), stack.delta_weights())
        assert stack.delta_weights().any()
    layer, twin = adapted.blocks[0].mlp.linear1, other.blocks[0].mlp.linear1
    x = torch.randn(3, 8)
    expected = nn.functional.linear(x, twin.weight + layer.delta_weight(), twin.bias)
    assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)


def test_a_factor_file_can_be_saved_and_loaded_again(
    adapted: Any, make_network: Any, tmp_path: Path, x: Tensor
) -> None:
    """The factors are not those of the base: a file saved without them must not rebuild them from the base."""
    tcur.save_adapter(adapted, tmp_path / "first", include_factors=True)
    other = make_network()
    twin = copy.deepcopy(other)
    tcur.load_adapter(other, tmp_path / "first")
    tcur.save_adapter(other, tmp_path / "second")
    tcur.load_adapter(twin, tmp_path / "second")
    assert torch.equal(twin(x), other(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_of_the_base_in_another_dtype_is_accepted(
    base: Any, adapted: Any, saved: Path, dtype: torch.dtype
) -> None:
    tcur.load_adapter(base.to(dtype), saved)
    for name, stack in tcur.stacks(adapted).items():
        twin = tcur.stacks(base)[name]
        assert twin.core.dtype == torch.promote_types(dtype, torch.float32)
        assert twin.col.dtype == dtype
        assert torch.equal(twin.core, stack.core.to(twin.core))
        change = (twin.delta_weights().float() - stack.delta_weights()).norm() / stack.delta_weights().norm()
        assert float(change.detach()) < 0.02  # rounding of C and R to 8 bits


def test_the_config_of_the_file_wins_over_defaults(base: Any, saved: Path) -> None:
    tcur.load_adapter(base, saved)
    assert base.tcur_stacks.config.rank == 2


def test_a_model_without_the_module_is_named(base: Any, saved: Path, state_of: Any, assert_unchanged: Any) -> None:
    del base.blocks[1]
    refused(base, saved, r"saved\.safetensors: stack 8x8 adapts blocks\.1\.attn\.qkv, which Network", state_of,
            assert_unchanged)  # fmt: skip


def test_a_module_of_another_kind_is_named(base: Any, saved: Path, state_of: Any, assert_unchanged: Any) -> None:
    base.blocks[0].mlp.linear1 = nn.Identity()
    refused(
        base,
        saved,
        r"blocks\.0\.mlp\.linear1 cannot be adapted: found a Identity, expected nn\.Linear",
        state_of,
        assert_unchanged,
    )


@pytest.mark.parametrize("include_factors", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.mlp.linear1", (8, 20)), ("blocks.1.mlp.linear1", (9, 16)), ("blocks.0.attn.qkv", (8, 25)),
        ("blocks.1.attn.qkv", (8, 27)), ("blocks.0.mlp.linear2", (16, 4)),
    ],
)  # fmt: skip
def test_a_module_of_another_shape_is_named(
    adapted: Any, base: Any, tmp_path: Path, name: str, shape: tuple[int, int], include_factors: bool, state_of: Any,
    assert_unchanged: Any,
) -> None:  # fmt: skip
    path = tcur.save_adapter(adapted, tmp_path / "saved.safetensors", include_factors=include_factors)
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, nn.Linear(*shape))
    refused(base, path, rf"saved\.safetensors: .*{name}", state_of, assert_unchanged)


@pytest.mark.parametrize("include_factors", [False, True])
def test_a_model_of_another_width_is_refused(
    adapted: Any, make_network: Any, tmp_path: Path, include_factors: bool, state_of: Any, assert_unchanged: Any
) -> None:
    path = tcur.save_adapter(adapted, tmp_path / "saved.safetensors", include_factors=include_factors)
    for width in (4, 16):
        refused(make_network(width=width), path, r"saved\.safetensors", state_of, assert_unchanged)


def test_another_adapter_in_the_model_is_refused(base: Any, saved: Path, state_of: Any, assert_unchanged: Any) -> None:
    tcur.inject(base, tcur.TCURConfig(rank=3))
    refused(base, saved, r"rank \(2, 2\).*not those the model is adapted with.*rank \(3, 3\).*remove", state_of,
            assert_unchanged)  # fmt: skip


def test_a_merged_model_is_refused(adapted: Any, saved: Path, state_of: Any, assert_unchanged: Any) -> None:
    tcur.merge(adapted)
    refused(adapted, saved, r"blocks\.0\.attn\.qkv is merged: call unmerge", state_of, assert_unchanged)


@pytest.mark.parametrize("kind", ["missing", "shape"])
def test_a_trained_parameter_that_does_not_fit_is_named(
    adapted: Any, base: Any, tmp_path: Path, kind: str, state_of: Any, assert_unchanged: Any
) -> None:
    tcur.unfreeze(adapted, ["head"])
    path = tcur.save_adapter(adapted, tmp_path / "saved.safetensors")
    base.head = nn.Identity() if kind == "missing" else nn.Linear(8, 4)
    message = r"head\.(weight|bias) (is in the file, but not in Network|has shape .* in the file)"
    refused(base, path, r"saved\.safetensors: " + message, state_of, assert_unchanged)


def edited(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tcurlora"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    header.pop("digest")  # so that the change itself has to be found
    safetensors.torch.save_file(tensors, path, {"tcurlora": json.dumps(header)})
    return path


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_indices_outside_the_weights_are_refused(
    base: Any, saved: Path, kind: str, state_of: Any, assert_unchanged: Any
) -> None:
    edited(saved, lambda header, tensors: tensors[f"{kind}.16x8"].__setitem__(0, 16))
    refused(base, saved, r"saved\.safetensors: stack 16x8 .*16", state_of, assert_unchanged)


def test_factors_of_another_shape_are_refused(
    adapted: Any, base: Any, tmp_path: Path, state_of: Any, assert_unchanged: Any
) -> None:
    path = tcur.save_adapter(adapted, tmp_path / "saved.safetensors", include_factors=True)
    edited(path, lambda header, tensors: tensors.update({"col.16x8": torch.zeros(1, 4)}))  # would broadcast
    refused(base, path, r"saved\.safetensors: .*16x8", state_of, assert_unchanged)


def test_a_base_that_trained_too_travels_with_the_adapter(
    network: Any, config: tcur.TCURConfig, x: Tensor, tmp_path: Path
) -> None:
    """With the adapted weights unfrozen, C and R are still those of the weights before training."""
    other = copy.deepcopy(network)
    tcur.inject(network, config)
    tcur.unfreeze(network, ["blocks"])
    learn(network, x)
    tcur.save_adapter(network, tmp_path)
    tcur.load_adapter(other, tmp_path)
    assert torch.equal(other(x), network(x))
    assert torch.equal(other.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


def test_files_of_two_models_in_one_folder_stay_apart(adapted: Any, train: Any, tmp_path: Path, x: Tensor) -> None:
    first, y = tcur.save_adapter(adapted, tmp_path / "a.safetensors"), adapted(x)
    tcur.save_adapter(train(adapted), tmp_path / "b.safetensors")
    assert not torch.equal(adapted(x), y)
    assert torch.equal(tcur.load_adapter(adapted, first)(x), y)


def test_nothing_of_an_adapter_is_left_after_load_and_remove(base: Any, saved: Path, x: Tensor) -> None:
    y = copy.deepcopy(base).requires_grad_(False)(x)
    tcur.remove(tcur.load_adapter(base, saved))
    assert not any(isinstance(module, TCURLayer) for module in base.modules())
    assert torch.equal(base(x), y)
