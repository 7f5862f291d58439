"""A quantised base: its layers are adapted, with C and R from the dequantised weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import tcurlora_ext as tcur
from tcurlora_ext.integrations.peft import TcurLoraConfig, TcurLoraLinear

WIDTH = 64


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def by_bitsandbytes(kind: str) -> nn.Sequential:
    nn_ = pytest.importorskip("bitsandbytes").nn
    model = plain()
    for name in ("0", "2"):
        linear = model.get_submodule(name)
        if kind == "4 bit":
            quantised = nn_.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
        else:
            quantised = nn_.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
        quantised.load_state_dict(linear.state_dict())
        model.set_submodule(name, quantised.to("cpu"))
    return model


def by_torchao() -> nn.Sequential:
    quantisation = pytest.importorskip("torchao.quantization")
    model = plain()
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    return model


KINDS: dict[str, Callable[[], nn.Sequential]] = {
    "bitsandbytes 4 bit": lambda: by_bitsandbytes("4 bit"),
    "bitsandbytes 8 bit": lambda: by_bitsandbytes("8 bit"),
    "torchao int8": by_torchao,
}


def adapt(model: nn.Module) -> PeftModel:
    return get_peft_model(model, TcurLoraConfig(r=2, target_modules=["0", "2"], init_weights=False)).eval()


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Sequential]:
    return KINDS[request.param]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, WIDTH)


def test_the_adapter_is_added_to_the_quantised_layers_own_result(make: Callable[[], nn.Sequential], x: Tensor) -> None:
    model = adapt(make())
    layer = model.base_model.model[0]
    assert isinstance(layer, TcurLoraLinear)
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.train()(x).square().sum().backward()
    core = model.base_model.stacks("default")["64x64"].core
    assert [p for p in model.parameters() if p.requires_grad] == [core]
    assert bool(core.grad.any())


def test_columns_and_rows_are_those_of_the_dequantised_weights(make: Callable[[], nn.Sequential]) -> None:
    model = adapt(make())
    layers = [model.base_model.model[0], model.base_model.model[2]]
    weights = torch.stack([layer.get_base_weight() for layer in layers])
    stack = model.base_model.stacks("default")["64x64"]
    expected = tcur.TCURStack.from_weights(weights, 2, scale=None)
    assert torch.equal(stack.rows, expected.rows)
    assert torch.equal(stack.col, expected.col)


@torch.no_grad()
def test_saved_and_loaded(make: Callable[[], nn.Sequential], x: Tensor, tmp_path: Path) -> None:
    model = adapt(make())
    model.save_pretrained(tmp_path)
    # Another loading of a quantised base need not give C and R again to the bit.
    assert any("tcurlora_col." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for low_cpu_mem_usage in (True, False):
        loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_as_a_lora_adapter(make: Callable[[], nn.Sequential], x: Tensor, tmp_path: Path) -> None:
    model = adapt(make())
    loaded = PeftModel.from_pretrained(make(), tcur.to_lora(model, tmp_path)).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_merged_and_unmerged(kind: str, x: Tensor) -> None:
    model, before = adapt(by_bitsandbytes(kind)), by_bitsandbytes(kind).eval()(x)
    layer = model.base_model.model[0]
    codes = layer.get_base_weight().clone()
    expected = model(x)
    model.merge_adapter()
    # Quantised again: as far from the adapted model as the quantised base is from its own weights.
    assert (model(x) - expected).norm() < 3 * (before - plain()(x)).norm()
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_weight(), codes, rtol=5e-3, atol=1e-5)


def test_torchao_alone_does_not_say_how_to_quantise_again() -> None:
    model = adapt(by_torchao())
    with pytest.raises(TypeError, match="expected a model quantised by transformers"):
        model.merge_adapter()


def test_an_adapter_of_the_base_before_it_was_quantised_is_refused(
    make: Callable[[], nn.Sequential], tmp_path: Path
) -> None:
    """Its columns and rows are those of other weights; with the factors in the file it loads."""
    config = tcur.TCURConfig(rank=2, target_modules=["0", "2"])
    model = tcur.inject(plain(), config)
    nn.init.normal_(tcur.stacks(model)["64x64"].core)
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"adapter\.safetensors: trained on other base weights: 2 of 2 slices"):
        tcur.load_adapter(make(), path)
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors", include_factors=True)
    loaded, x = tcur.load_adapter(make(), path).eval(), torch.randn(5, WIDTH)
    assert float((loaded(x) - model.eval()(x)).norm() / model(x).norm()) < 0.3
