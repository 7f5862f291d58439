"""TCURLinear behaves as nn.Linear wherever code expects one."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.maths.selection import select


def trained(layer: tcur.TCURLinear) -> tcur.TCURLinear:
    layer.stack.set_core_slices(torch.randn(layer.stack.core.shape))
    return layer


def dense(layer: tcur.TCURLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias)


def test_the_signature_begins_as_that_of_nn_linear() -> None:
    ours = list(inspect.signature(tcur.TCURLinear).parameters)
    assert ours[:3] == ["in_features", "out_features", "bias"]
    assert {"device", "dtype", "rank", "slices"} <= set(ours)
    layer = tcur.TCURLinear(6, 10, False, 2, dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias) == (6, 10, None)
    assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_it_computes_base_and_delta(slices: int, bias: bool) -> None:
    layer = tcur.TCURLinear(6, 12, bias, rank=(3, 2), slices=slices)
    x = torch.randn(2, 5, 6)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    trained(layer)
    assert layer.stack.slices == slices
    assert layer.delta_weight().shape == (12, 6)
    assert not torch.allclose(layer(x), plain, atol=1e-3)
    assert_close(layer(x), dense(layer, x), rtol=1e-5, atol=1e-5)


def test_only_the_core_trains() -> None:
    layer = tcur.TCURLinear(6, 12, rank=2)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["stack.core"]
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is None
    assert layer.stack.core.grad is not None
    assert bool(layer.stack.core.grad.any())


def test_from_linear_shares_the_parameters_and_leaves_the_plain_layer_alone() -> None:
    linear = nn.Linear(6, 12)
    keys = list(linear.state_dict())
    layer = tcur.TCURLinear.from_linear(linear, rank=2, slices=2)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert type(linear) is nn.Linear
    assert list(linear.state_dict()) == keys
    assert torch.equal(layer(torch.ones(1, 6)), linear(torch.ones(1, 6)))


def test_hooks_and_attributes_of_the_plain_layer_stay() -> None:
    linear = nn.Linear(6, 6)
    seen: list[str] = []
    linear.register_forward_hook(lambda *_: seen.append("forward"))
    linear.note = "mine"  # type: ignore[assignment]
    layer = tcur.TCURLinear.from_linear(linear, rank=2)
    layer(torch.ones(1, 6))
    assert seen == ["forward"]
    assert layer.note == "mine"


@pytest.mark.parametrize("slices", [0, 5, 24, -1])
def test_slices_that_do_not_divide_the_output_are_refused(slices: int) -> None:
    with pytest.raises(ValueError, match=f"slices is {slices}, expected a divisor of the 12"):
        tcur.TCURLinear(6, 12, rank=1, slices=slices)


def test_the_state_of_a_plain_layer_loads_and_rows_and_columns_are_chosen_from_it() -> None:
    layer = tcur.TCURLinear(6, 12, rank=2, slices=2)
    other = nn.Linear(6, 12)
    expected = tcur.TCURLinear.from_linear(nn.Linear(6, 12), rank=2, slices=2)
    expected.weight.data, expected.bias.data = other.weight.data.clone(), other.bias.data.clone()
    chosen = select(other.weight.detach().unflatten(0, (2, -1)), 2, 2)
    result = layer.load_state_dict(other.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(layer.stack.columns, chosen.columns)
    assert torch.equal(layer.stack.rows, chosen.rows)
    fresh = tcur.TCURLinear.from_linear(other, rank=2, slices=2)
    for name, tensor in fresh.stack.state_dict().items():
        assert torch.equal(layer.stack.state_dict()[name], tensor), name
    assert layer.stack.row_scores == fresh.stack.row_scores


def test_the_state_loads_back_into_a_plain_layer() -> None:
    layer, plain = trained(tcur.TCURLinear(6, 12, rank=2)), nn.Linear(6, 12)
    result = plain.load_state_dict(layer.state_dict(), strict=False)
    assert not result.missing_keys
    assert all(key.startswith("stack.") for key in result.unexpected_keys)
    assert torch.equal(plain.weight, layer.weight)


def test_its_own_state_loads_with_the_core() -> None:
    first, second = trained(tcur.TCURLinear(6, 12, rank=2)), tcur.TCURLinear(6, 12, rank=2)
    x = torch.randn(3, 6)
    core = second.stack.core
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first(x))
    assert second.stack.core is core


def test_another_base_under_a_trained_core_gives_a_warning() -> None:
    layer = trained(tcur.TCURLinear(6, 12, rank=2))
    factors = layer.stack.col.clone()
    with pytest.warns(UserWarning, match="changed under a trained core"):
        layer.load_state_dict(nn.Linear(6, 12).state_dict())
    assert torch.equal(layer.stack.col, factors)


@pytest.mark.parametrize("trainable", ["core", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_base_under_a_trained_core_gives_none(trainable: str, dtype: torch.dtype) -> None:
    layer = trained(tcur.TCURLinear(6, 12, rank=2, trainable=trainable)).to(dtype)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    plain = {name: before[name] for name in ("weight", "bias")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.load_state_dict(plain)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keeps_the_core_in_float32_and_answers_in_half(dtype: torch.dtype) -> None:
    layer = trained(tcur.TCURLinear(6, 12, rank=2))
    exact = layer(torch.ones(3, 6))
    layer.to(dtype)
    y = layer(torch.ones(3, 6, dtype=dtype))
    assert y.dtype == dtype
    assert layer.stack.core.dtype == torch.float32
    assert_close(y.float(), exact, rtol=0.05, atol=0.05)  # a few roundings of 8 or 11 bits
    y.sum().backward()
    assert layer.stack.core.grad is not None
    assert layer.stack.core.grad.dtype == torch.float32


def test_autocast_gives_the_dtype_of_a_plain_layer() -> None:
    layer = trained(tcur.TCURLinear(6, 12, rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.stack.core.grad is not None
    assert layer.stack.core.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
def test_merge_and_unmerge(dtype: torch.dtype, transform: str) -> None:
    layer = trained(tcur.TCURLinear(16, 12, rank=2, slices=3, dtype=dtype, transform=transform))
    x = torch.randn(5, 16, dtype=dtype)
    before, parameter, y = layer.weight.detach().clone(), layer.weight, layer(x)
    layer.merge()
    assert layer.merged
    layer.merge()  # twice is once
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]  # some roundings
    assert_close(layer(x), y, rtol=tolerance, atol=tolerance)
    # One rounding of the sum to its dtype, and of a delta_weight that is not summed in double.
    eps = 8 * torch.finfo(dtype).eps
    assert_close(layer.weight.double(), before.double() + layer.delta_weight().double(), rtol=eps, atol=eps)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert layer.weight is parameter
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_a_merged_layer_saves_the_base_and_refuses_to_load() -> None:
    layer = trained(tcur.TCURLinear(6, 12, rank=2))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.merge()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(RuntimeError, match=r"weight: this layer is merged; call unmerge"):
        layer.load_state_dict(before)


def test_a_change_that_is_not_finite_is_not_merged() -> None:
    layer = tcur.TCURLinear(6, 12, rank=2)
    with torch.no_grad():
        layer.stack.core.fill_(float("inf"))
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("options", [{"rank": 7}, {"rank": 2, "selection": "best"}, {"rank": 2, "transform": "fft"}])
def test_wrong_options_are_refused_and_leave_the_layer_trainable(options: dict[str, Any]) -> None:
    linear = nn.Linear(6, 12)
    with pytest.raises(ValueError, match=r"rank|selection rule|transform"):
        tcur.TCURLinear.from_linear(linear, **options)
    assert linear.weight.requires_grad
    assert type(linear) is nn.Linear


def test_wrong_input_names_the_tensor() -> None:
    layer = tcur.TCURLinear(6, 12, rank=2)
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\), expected \(3, 6\)"):
        layer(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"expected torch\.float64 as x"):
        layer(torch.zeros(3, 6, dtype=torch.float64))
