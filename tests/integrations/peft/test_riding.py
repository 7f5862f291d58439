"""Adapters that ride on a PEFT layer's base product: which bases carry them, and that the delta is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear

WIDTH = 64
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)


def by_conv1d() -> nn.Sequential:
    model = plain()
    model[0] = Conv1D(WIDTH, WIDTH).requires_grad_(False)
    return model


def by_four_bits() -> nn.Sequential:
    quantised = pytest.importorskip("bitsandbytes").nn.Linear4bit(
        WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4"
    )
    return _with_quantised(quantised)


def by_eight_bits() -> nn.Sequential:
    return _with_quantised(pytest.importorskip("bitsandbytes").nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False))


def _with_quantised(quantised: nn.Module) -> nn.Sequential:
    model = plain()
    quantised.load_state_dict(model[0].state_dict())
    model[0] = quantised.to("cpu")
    return model


def by_torchao() -> nn.Sequential:
    quantisation = pytest.importorskip("torchao.quantization")
    model = plain()
    quantisation.quantize_(model[0], quantisation.Int8WeightOnlyConfig())
    return model


CARRIERS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": plain, "Conv1D": by_conv1d, "4 bit": by_four_bits, "int8 weights": by_torchao,
}  # fmt: skip
CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["0"], "stack_by": "none", "transform": "identity"}


def adapted(model: nn.Module, **options: Any) -> tuple[PeftModel, TcurLoraLinear]:
    peft = get_peft_model(model, TcurLoraConfig(**CONFIG, init_weights=False, **options)).eval()
    layer = peft.base_model.model[0]
    assert isinstance(layer, TcurLoraLinear)
    return peft, layer


def seen_by(base: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What a call gives, and the input that the base layer then got; not by a hook, which a layer would respect."""
    inputs: list[Tensor] = []
    forward = base.forward

    def spy(x: Tensor) -> Tensor:
        inputs.append(x)
        return forward(x)

    base.forward = spy  # type: ignore[method-assign]
    try:
        return call(), inputs[0]
    finally:
        del base.forward


@pytest.mark.parametrize("make", CARRIERS.values(), ids=CARRIERS)
def test_the_base_carries_the_adapter(make: Callable[[], nn.Sequential]) -> None:
    """By the operator with the base product in it or in front of the base; either way the delta and its gradients."""
    _, layer = adapted(make())
    stack = layer.slices["default"].stack
    assert stack.rides
    assert stack.held_col is not None  # PEFT's files have it
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    g = torch.randn(2, 5, WIDTH)

    def by_delta() -> Tensor:
        return layer.base_layer(x) + layer._delta(layer.slices["default"], x, torch.float32)

    def results(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, [x, stack.core], g)]

    found, expected = results(layer(x)), results(by_delta())
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    _, seen = seen_by(layer.base_layer, lambda: layer(x))
    columns = stack.columns
    rest = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, columns, False)
    assert torch.equal(seen[..., rest], x[..., rest])
    assert not torch.equal(seen[..., columns], x[..., columns])


@torch.no_grad()
def test_a_base_that_rounds_its_input_gets_x_and_keeps_a_small_change() -> None:
    _, layer = adapted(by_eight_bits())
    layer.slices["default"].stack.core.mul_(1e-3)
    x = torch.randn(5, WIDTH)
    y, seen = seen_by(layer.base_layer, lambda: layer(x))
    assert torch.equal(seen, x)
    delta = x @ layer.get_delta_weight("default").T
    assert_close(y - layer.base_layer(x), delta, rtol=0.05, atol=0.05 * float(delta.abs().max()))


@torch.no_grad()
def test_a_layer_of_another_tuner_around_the_base_sees_x() -> None:
    model = plain()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model)
    lora = model[0]
    x = torch.randn(5, WIDTH)
    before = lora(x)
    peft = get_peft_model(model, TcurLoraConfig(**CONFIG, init_weights=False)).eval()
    layer = peft.base_model.model[0]
    assert layer.base_layer is lora
    assert not layer._can_carry(layer.slices["default"])
    assert_close(layer(x), before + x @ layer.get_delta_weight("default").T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_hook_of_the_base_sees_x() -> None:
    _, layer = adapted(plain())
    x = torch.randn(5, WIDTH)
    expected = layer(x)
    inputs: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(inputs[0], x)


@torch.no_grad()
def test_two_adapters_add_their_deltas() -> None:
    peft, layer = adapted(plain())
    peft.add_adapter("other", TcurLoraConfig(**CONFIG | {"r": 3}, init_weights=False))
    peft.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, WIDTH)
    expected = layer.base_layer(x)
    for name in ("default", "other"):
        expected = expected + x @ layer.get_delta_weight(name).T
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", CARRIERS.values(), ids=CARRIERS)
def test_it_rides_again_when_loaded(make: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    peft, _ = adapted(make())
    x = torch.randn(5, WIDTH)
    for save_projection in (True, False):
        peft.peft_config["default"].save_projection = save_projection
        folder = tmp_path / str(save_projection)
        peft.save_pretrained(folder)
        for low_cpu_mem_usage in (True, False):
            loaded = PeftModel.from_pretrained(make(), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert loaded.base_model.model[0].slices["default"].stack.rides
            assert_close(loaded(x), peft(x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_factors_of_another_base_do_not_ride(tmp_path: Path) -> None:
    peft, layer = adapted(plain(), save_projection=True)
    peft.save_pretrained(tmp_path)
    other = plain()
    other[0].weight.add_(0.1 * torch.randn(WIDTH, WIDTH))
    loaded = PeftModel.from_pretrained(other, tmp_path).eval().base_model.model[0]
    assert not loaded.slices["default"].stack.rides
    x = torch.randn(5, WIDTH)
    expected = loaded.base_layer(x) + x @ layer.get_delta_weight("default").T
    assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_base_weights_loaded_beneath_an_adapter_leave_c_as_it_was() -> None:
    peft, layer = adapted(plain())
    delta = layer.get_delta_weight("default")
    state = {key: 2 * value if key.endswith("base_layer.weight") else value for key, value in peft.state_dict().items()}
    peft.load_state_dict(state)
    x = torch.randn(5, WIDTH)
    assert_close(layer(x), layer.base_layer(x) + x @ delta.T, rtol=1e-5, atol=1e-5)


def test_a_base_weight_that_trains_leaves_c_as_it_was() -> None:
    _, layer = adapted(plain())
    delta = layer.get_delta_weight("default").detach()
    layer.base_layer.weight.requires_grad_(True)
    x = torch.randn(5, WIDTH)
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    assert_close(layer(x), layer.base_layer(x) + x @ delta.T, rtol=1e-5, atol=1e-5)


def test_a_copy_rides_on_its_own_base() -> None:
    peft, layer = adapted(plain())
    other = copy.deepcopy(peft)
    twin = other.base_model.model[0]
    stack = twin.slices["default"].stack
    assert stack.rides
    assert stack.layers[0] is twin
    assert stack is not layer.slices["default"].stack
