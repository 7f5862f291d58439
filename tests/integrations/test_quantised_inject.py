"""``tcur.inject`` on quantised layers: they keep their own forward pass, and carry the adapter."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.carried import TCURCarried

from .peft.test_quantised import plain
from .peft.test_riding import WIDTH, by_eight_bits, by_four_bits, by_torchao

KINDS: dict[str, Callable[[], nn.Sequential]] = {
    "4 bit": by_four_bits,
    "8 bit": by_eight_bits,
    "int8 weights": by_torchao,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "light": {"stack_by": "none", "transform": "identity"},
    "paper": {},
    "dropout": {"stack_by": "none", "transform": "identity", "dropout": 0.3},
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
configs = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def adapted(make: Callable[[], nn.Sequential], **options: Any) -> nn.Sequential:
    model = make()
    tcur.inject(model, tcur.TCURConfig(rank=4, target_modules=["0", "2"], **options))
    torch.manual_seed(2)
    for stack in tcur.stacks(model).values():
        nn.init.normal_(stack.core, std=0.3)
    return model.eval()


@kinds
@configs
def test_the_delta_is_that_of_the_dequantised_weight(
    make: Callable[[], nn.Sequential], options: dict[str, Any]
) -> None:
    layer = adapted(make, **options)[0]
    assert isinstance(layer, TCURCarried)
    assert isinstance(layer, type(make()[0]))
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    g = torch.randn(2, 5, WIDTH)
    core = layer.stack.core
    found = layer(x)
    gradients = torch.autograd.grad(found, [x, core], g)
    right = layer.kind.forward(layer, x) + x @ layer.delta_weight().T
    assert_close(found, right, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(gradients, torch.autograd.grad(right, [x, core], g), strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@kinds
def test_a_base_that_does_not_round_its_input_carries_the_change(make: Callable[[], nn.Sequential]) -> None:
    layer = adapted(make, **CONFIGS["light"])[0]
    x, inputs = torch.randn(5, WIDTH), []
    kind = type(layer).kind
    forward = kind.forward
    try:
        kind.forward = lambda self, x: (inputs.append(x), forward(self, x))[1]  # type: ignore[method-assign]
        layer(x)
    finally:
        kind.forward = forward  # type: ignore[method-assign]
    assert torch.equal(inputs[0], x) == (make is by_eight_bits)


@torch.no_grad()
@kinds
@configs
def test_saved_loaded_copied_and_removed(
    make: Callable[[], nn.Sequential], options: dict[str, Any], tmp_path: Path
) -> None:
    model, base = adapted(make, **options), make().eval()
    x = torch.randn(5, WIDTH)
    expected = model(x)
    tcur.save_adapter(model, tmp_path)
    loaded = tcur.load_adapter(make(), tmp_path).eval()
    assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)
    assert [stack.rides for stack in tcur.stacks(loaded).values()] == [s.rides for s in tcur.stacks(model).values()]
    assert_close(copy.deepcopy(model)(x), expected, rtol=1e-6, atol=1e-6)
    if make is by_four_bits:  # the other kinds' own weights do not pickle, or need their library to unpickle
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert_close(torch.load(buffer, weights_only=False)(x), expected, rtol=1e-6, atol=1e-6)
    tcur.remove(model)
    assert type(model[0]) is type(base[0])
    assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)


@kinds
def test_it_cannot_be_merged_and_says_so(make: Callable[[], nn.Sequential]) -> None:
    model = adapted(make, **CONFIGS["light"])
    with pytest.raises(ValueError, match=r"0: it is quantised, a .* and cannot be merged"):
        tcur.merge(model)
    assert not any(getattr(layer, "merged", False) for layer in model)


@torch.no_grad()
@kinds
def test_as_a_lora_adapter(make: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    from peft import PeftModel

    model, x = adapted(make, **CONFIGS["light"]), torch.randn(5, WIDTH)
    loaded = PeftModel.from_pretrained(make(), tcur.to_lora(model, tmp_path)).eval()
    assert_close(loaded(x), model(x), rtol=1e-3, atol=1e-3)


@kinds
@pytest.mark.parametrize("factors", ["learned", "learned_rows"])
def test_factors_learned_on_the_float_model(make: Callable[[], nn.Sequential], factors: str, tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).sin()

    def step(model: nn.Module) -> torch.Tensor:
        return (model(x) - x.flip(0)).square().sum()

    config = tcur.TCURConfig.preset("learned", rank=4, target_modules=["0", "2"], factors=factors)
    subspace = tcur.learn_factors(plain(), config, step, steps=6)
    with pytest.raises(ValueError, match="is quantised, and its weight cannot train"):
        tcur.learn_factors(make(), config, step)
    model = tcur.inject(make(), subspace=subspace)
    first = float(step(model).detach())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        step(model).backward()
        optimizer.step()
    assert float(step(model).detach()) < 0.95 * first
    expected = model.eval()(x)
    whole = tcur.save_adapter(model, tmp_path / "whole.safetensors")
    assert torch.equal(tcur.load_adapter(make(), whole).eval()(x), expected)
    cores = tcur.save_adapter(model, tmp_path / "cores.safetensors", include_subspace=False)
    assert torch.equal(tcur.load_adapter(make(), cores, subspace).eval()(x), expected)


def test_summary_counts_weights_not_bytes() -> None:
    found = tcur.summary(adapted(by_four_bits, **CONFIGS["light"]))
    assert found.coverage == 1.0


def test_what_peft_cannot_read_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcurlora_ext.adapter.layer.quantised.reader_of", lambda module: None)
    model = by_four_bits()
    with pytest.raises(
        ValueError, match=r"0 cannot be adapted: it is quantised, a .*4bit whose weight PEFT cannot read"
    ):
        tcur.inject(model, tcur.TCURConfig(rank=2, target_modules=["0"]))
    assert not tcur.stacks(model)


def test_a_single_layer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"linear is quantised: a Linear4bit .*tcur\.inject"):
        tcur.TCURLinear.from_linear(by_four_bits()[0], rank=2)


@kinds
def test_a_bank_refuses_it_by_name(make: Callable[[], nn.Sequential]) -> None:
    """Its forward pass would give every sample the model's own adapter."""
    with pytest.raises(ValueError, match="stack 64x64 has quantised layers"):
        tcur.AdapterBank(adapted(make))
