"""Adapters that ride on the base product: when layers take that form, and that nothing else about them is different."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURLayer

# One core a layer; one core a slice of a stack; with a fused projection as three slices.
RIDING = {
    "light": tcur.TCURConfig.preset("light", rank=(3, 2)),
    "none": tcur.TCURConfig(rank=2, stack_by="none", split_fused={}),
    "identity": tcur.TCURConfig(rank=(2, 3), transform="identity"),
    "raw": tcur.TCURConfig(rank=2, transform="identity", scale=0.5),
    "slice domain": tcur.TCURConfig(rank=2, stack_by="none", split_fused={}, core_domain="slice"),
    "dct": tcur.TCURConfig(rank=2, stack_by="none", split_fused={}, transform="dct"),
}
ORDINARY = {
    "paper": tcur.TCURConfig.preset("paper", rank=2),
    "factors train": tcur.TCURConfig(rank=2, transform="identity", trainable="all"),
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
riding = pytest.mark.parametrize("config", RIDING.values(), ids=RIDING)


def layers_of(model: nn.Module) -> list[TCURLayer]:
    return [layer for layer in model.modules() if isinstance(layer, TCURLayer)]


def stirred(model: nn.Module, config: tcur.TCURConfig) -> nn.Module:
    """The model in float64 with an adapter whose cores are not zero."""
    tcur.inject(model.double(), config)
    torch.manual_seed(1)
    for stack in tcur.stacks(model).values():
        nn.init.normal_(stack.core, std=0.2)
    return model.eval()


def dense(model: nn.Module) -> nn.Module:
    """A plain copy in which every adapted layer has W + dW."""
    return tcur.remove(tcur.merge(copy.deepcopy(model)))


@riding
def test_it_is_taken_where_every_slice_has_a_core(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    base = copy.deepcopy(network).double().eval()
    model = stirred(network, config)
    assert all(stack.rides and stack.held_col is None for stack in tcur.stacks(model).values())
    assert_close(model(x.double()), dense(model)(x.double()), **EXACT)
    for stack in tcur.stacks(model).values():
        nn.init.zeros_(stack.core)
    z = torch.randn(5, 7, 8, dtype=torch.float64)
    for block, plain in zip(model.blocks, base.blocks, strict=True):
        # A fused projection as three slices is three products, whose sums may be in another order.
        assert torch.equal(block.mlp(z), plain.mlp(z))
        assert_close(block(z), plain(z), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("config", ORDINARY.values(), ids=ORDINARY)
def test_it_is_not_taken_elsewhere(network: Any, config: tcur.TCURConfig) -> None:
    stacks = tcur.stacks(tcur.inject(network, config)).values()
    assert not any(stack.rides for stack in stacks if stack.slices > 1 or config.trainable == "all")
    assert all(stack.held_col is not None for stack in stacks if not stack.rides)


@riding
def test_gradients_are_those_of_the_dense_weight(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    model = stirred(network, config)
    model(x.double()).square().sum().backward()
    cores = [stack.core for stack in tcur.stacks(model).values()]
    found = [core.grad.clone() for core in cores]
    weights = {
        f"{name}.weight": layer.weight + layer.delta_weight()
        for name, layer in model.named_modules()
        if isinstance(layer, TCURLayer)
    }
    plain = tcur.remove(copy.deepcopy(model))
    torch.func.functional_call(plain, weights, (x.double(),)).square().sum().backward(inputs=cores)
    for before, core in zip(found, cores, strict=True):
        assert_close(core.grad - before, before, rtol=1e-9, atol=1e-12)


@riding
def test_columns_are_gathered_on_demand(network: Any, config: tcur.TCURConfig) -> None:
    model = tcur.inject(network, config)
    for name, stack in tcur.stacks(model).items():
        W = torch.cat([layer.weight_slices() for layer in layers_of(model) if layer.stack is stack])
        C = W[:, :, stack.columns]
        if stack.normalised:
            C = C / torch.linalg.vector_norm(C, dim=(0, 1))
        assert_close(stack.C, C, msg=name)
        assert "col" not in dict(stack.named_buffers())
    assert not any(key.endswith(".col") for key in model.state_dict())


@riding
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_gathers_from_its_own_weights(
    network: Any, x: Tensor, config: tcur.TCURConfig, way: str
) -> None:
    model = stirred(network, config)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for name, stack in tcur.stacks(other).items():
        assert stack.rides
        assert_close(stack.col, tcur.stacks(model)[name].col)
        assert all(layer.stack is not tcur.stacks(model)[name] for layer in stack.layers.values())
    assert_close(other(x.double()), model(x.double()), **EXACT)


@riding
def test_states_load_with_and_without_columns(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    twin, other = (tcur.inject(copy.deepcopy(network).double(), config).eval() for _ in range(2))
    model = stirred(network, config)
    state = model.state_dict()
    twin.load_state_dict(state)
    assert_close(twin(x.double()), model(x.double()), **EXACT)

    # As written before 0.2: with C, and without what C's columns are multiplied by.
    before = {key: value for key, value in state.items() if not key.endswith(".gain")}
    for name, stack in tcur.stacks(model).items():
        before[f"tcur_stacks.{name}.col"] = stack.col
    other.load_state_dict(before)
    assert_close(other(x.double()), model(x.double()), **EXACT)
    assert all(stack.rides for stack in tcur.stacks(other).values())

    # C of other weights stays that of the state.
    for name in tcur.stacks(model):
        before[f"tcur_stacks.{name}.col"] = -1.5 * before[f"tcur_stacks.{name}.col"]
    other.load_state_dict(before)
    assert not any(stack.rides for stack in tcur.stacks(other).values())
    assert_close(other(x.double()), dense(other)(x.double()), **EXACT)
    other.load_state_dict(state)
    assert_close(other(x.double()), model(x.double()), **EXACT)
    assert all(stack.rides for stack in tcur.stacks(other).values())


@riding
def test_a_state_without_c_needs_the_base_that_it_was_saved_over(network: Any, config: tcur.TCURConfig) -> None:
    """What C is then taken from; weights of a shorter dtype are still the same base."""
    other = copy.deepcopy(network).double()
    for parameter in other.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    short = tcur.inject(copy.deepcopy(network).bfloat16(), config)
    state = {key: value for key, value in stirred(network, config).state_dict().items() if "tcur_stacks" in key}
    assert not [key for key in short.load_state_dict(state, strict=False).missing_keys if key.endswith(".col")]
    with pytest.warns(UserWarning, match="was saved over other base weights"):
        missing = tcur.inject(other, config).load_state_dict(state, strict=False).missing_keys
    assert any(key.endswith(".col") for key in missing)


@riding
def test_a_weight_that_trains_leaves_c_as_it_was(
    network: Any, x: Tensor, tmp_path: Path, config: tcur.TCURConfig
) -> None:
    base = copy.deepcopy(network).double()
    model = stirred(network, config)
    layer = model.blocks[0].mlp.linear1
    C = layer.stack.C
    tcur.unfreeze(model, "blocks.0.mlp.linear1.weight")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model(x.double()).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.weight, base.blocks[0].mlp.linear1.weight)
    assert not layer.stack.rides
    assert_close(layer.stack.C, C)
    assert_close(model(x.double()), dense(model)(x.double()), **EXACT)
    tcur.save_adapter(model, tmp_path)
    assert_close(tcur.load_adapter(base, tmp_path).eval()(x.double()), model(x.double()), **EXACT)


@riding
def test_a_new_base_under_a_trained_core_leaves_c_as_it_was(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    torch.manual_seed(5)
    other = {
        key: value + 0.3 * torch.randn_like(value)
        for key, value in network.double().state_dict().items()
        if value.is_floating_point()
    }
    model = stirred(network, config)
    C = {name: stack.C for name, stack in tcur.stacks(model).items()}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.load_state_dict(other, strict=False)
    assert any("changed under a trained core" in str(warning.message) for warning in seen)
    for name, stack in tcur.stacks(model).items():
        assert_close(stack.C, C[name])
    assert_close(model(x.double()), dense(model)(x.double()), **EXACT)


@riding
def test_a_new_base_under_a_zero_core_is_followed(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    torch.manual_seed(5)
    other = {
        key: value + 0.3 * torch.randn_like(value)
        for key, value in network.state_dict().items()
        if value.is_floating_point()
    }
    model = tcur.inject(network, config)
    model.load_state_dict(other, strict=False)
    plain = tcur.remove(copy.deepcopy(model))
    fresh = tcur.inject(plain, config)
    for name, stack in tcur.stacks(model).items():
        assert stack.rides
        assert torch.equal(stack.columns, tcur.stacks(fresh)[name].columns)
        assert torch.equal(stack.gain, tcur.stacks(fresh)[name].gain)
        assert stack.scale == tcur.stacks(fresh)[name].scale


@riding
def test_stored_factors_serve_another_base(network: Any, x: Tensor, tmp_path: Path, config: tcur.TCURConfig) -> None:
    torch.manual_seed(5)
    other = copy.deepcopy(network).double().eval()
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = stirred(network, config)
    tcur.save_adapter(model, tmp_path, include_factors=True)
    tcur.load_adapter(other, tmp_path)
    for name, stack in tcur.stacks(other).items():
        assert not stack.rides
        assert_close(stack.C, tcur.stacks(model)[name].C)
    assert_close(other(x.double()), dense(other)(x.double()), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@riding
def test_shorter_dtypes_keep_core_and_gain_wide(
    network: Any, x: Tensor, config: tcur.TCURConfig, dtype: torch.dtype
) -> None:
    model = stirred(network, config).float()
    right = model(x)
    low = copy.deepcopy(model).to(dtype)
    for stack in tcur.stacks(low).values():
        assert (stack.core.dtype, stack.gain.dtype, stack.row.dtype) == (torch.float32, torch.float32, dtype)
    assert_close(low(x.to(dtype)).float(), right, rtol=0.1, atol=0.1)


@riding
def test_dropout_acts_on_the_adapters_input_alone(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    options = config.to_json() | {"dropout": 0.4}
    layer = stirred(network, tcur.TCURConfig.from_json(options)).blocks[0].mlp.linear2.train()
    z = torch.randn(4, layer.weight.shape[1], dtype=torch.float64)
    torch.manual_seed(3)
    found = layer(z)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(z, 0.4)
    delta = layer.delta_weight()
    assert_close(found, nn.functional.linear(z, layer.weight, layer.bias) + dropped @ delta.T, **EXACT)


@riding
def test_a_block_compiles_whole(network: Any, config: tcur.TCURConfig) -> None:
    block, z = stirred(network, config).blocks[0], torch.randn(3, 5, 8, dtype=torch.float64)
    torch._dynamo.reset()
    assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(z), block(z))


@riding
def test_an_exported_copy_computes_the_same(network: Any, x: Tensor, config: tcur.TCURConfig) -> None:
    model = stirred(network, config)
    assert_close(tcur.plain_copy(model)(x.double()), model(x.double()), **EXACT)
    assert all(stack.rides for stack in tcur.stacks(model).values())  # the model itself goes on as before


def test_a_column_that_the_caller_chose_twice_is_held() -> None:
    weight = torch.randn(1, 6, 5)
    chosen = tcur.TCURStack.from_weights(weight, 2).selection._replace(columns=torch.tensor([3, 3]))
    layer = tcur.TCURLinear.from_linear(nn.Linear(5, 6), 2, selection=chosen)
    nn.init.normal_(layer.stack.core)
    assert not layer.stack.rides
    x = torch.randn(4, 5)
    assert_close(layer(x), nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias))


def test_a_stack_whose_layers_are_gone_says_so() -> None:
    layer = tcur.TCURLinear(5, 6, rank=2)
    stack = layer.stack
    del layer
    with pytest.raises(ValueError, match="C is columns of the weights of its layer, which are gone"):
        stack.col  # noqa: B018


def test_a_core_trained_in_bfloat16_reaches_the_loss_of_float32() -> None:
    """Changes below an eighth of a percent of a feature are rounded away there; training does not depend on them."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 8))
    teacher = copy.deepcopy(plain)
    x = torch.randn(256, 24)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        target = teacher(x)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig.preset("light", rank=8, target_modules=["0", "2"]))
        model.to(dtype)
        assert all(stack.rides for stack in tcur.stacks(model).values())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(200):
            loss = nn.functional.mse_loss(model(x.to(dtype)).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[dtype] = loss.item()
    start = nn.functional.mse_loss(plain(x), target).item()
    assert losses[torch.float32] < 0.7 * start
    assert losses[torch.bfloat16] < losses[torch.float32] + 0.03 * start


def test_presets() -> None:
    assert tcur.TCURConfig.preset("paper") == tcur.TCURConfig()
    light = tcur.TCURConfig.preset("light", rank=4)
    assert (light.rank, light.stack_by, light.transform) == (4, "none", "identity")
    with pytest.raises(ValueError, match="preset is 'fast', expected one of 'paper', 'light'"):
        tcur.TCURConfig.preset("fast")
