"""orthonormal=True: the chosen columns and rows with unit length and right angles at every frequency."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

FORMS = {
    "coupled": tcur.TCURConfig(rank=2, orthonormal=True),
    "lowest frequencies": tcur.TCURConfig(rank=2, orthonormal=True, frequencies=2),
    "own cores": tcur.TCURConfig.preset("light", rank=3, orthonormal=True),
    "own cores of slices": tcur.TCURConfig(rank=2, orthonormal=True, transform="identity"),
}


@pytest.fixture(params=FORMS)
def config(request: pytest.FixtureRequest) -> tcur.TCURConfig:
    return FORMS[request.param]


def test_factors_are_orthonormal_and_span_what_the_chosen_ones_do(network: nn.Module, config: tcur.TCURConfig) -> None:
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    for stack in tcur.stacks(tcur.inject(network, config)).values():
        along, kept = stack.options.along, stack.options.frequencies
        C, R = (along.spectrum(t.double())[0][:kept] for t in (stack.C, stack.R.mT))
        unit = torch.eye(C.shape[2], dtype=C.dtype).expand(len(C), -1, -1)
        torch.testing.assert_close(C.mH @ C, unit, rtol=0, atol=1e-5)
        torch.testing.assert_close(R.mH @ R, unit, rtol=0, atol=1e-5)
        W = torch.stack([
            weights[f"{name.partition('[')[0]}.weight"].view(-1, *stack.shape)[int(name.partition("[")[2][:-1] or 0)]
            for name in stack.names
        ])  # fmt: skip
        for factor, chosen in ((C, W[:, :, stack.columns]), (R, W[:, stack.rows].mT)):
            parts = along.spectrum(chosen.double())[0][:kept]
            torch.testing.assert_close(factor @ (factor.mH @ parts), parts, rtol=1e-4, atol=1e-5)


def test_the_first_step_is_as_long_as_the_rule_says(network: nn.Module, config: tcur.TCURConfig) -> None:
    """A step of random signs: its length, over many draws, is that of LoRA of rank 8."""
    for stack in tcur.stacks(tcur.inject(network, config)).values():
        out_features, _ = stack.shape
        lengths = []
        for _ in range(200):
            with torch.no_grad():
                stack.core.copy_(torch.randn_like(stack.core).sign())
            lengths.append(stack.delta_weights().square().sum((1, 2)).mean())
        found = float(torch.stack(lengths).mean().sqrt())
        assert found == pytest.approx((out_features * 8 / 3) ** 0.5, rel=0.15)


def test_riding_equals_the_ordinary_form(network: nn.Module, train: Callable[..., Any], x: Tensor) -> None:
    model = train(tcur.inject(network, FORMS["own cores"])).double()
    assert all(stack.rides for stack in tcur.stacks(model).values())
    ordinary = copy.deepcopy(model)
    for stack in tcur.stacks(ordinary).values():
        stack.hold_columns()
        assert not stack.rides
    torch.testing.assert_close(model(x.double()), ordinary(x.double()), rtol=1e-12, atol=1e-12)
    grads = []
    for one in (model, ordinary):
        one(x.double()).square().sum().backward()
        grads.append([stack.core.grad for stack in tcur.stacks(one).values()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-11)


def test_files_and_states(
    network: nn.Module, config: tcur.TCURConfig, train: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    base = copy.deepcopy(network)
    model = train(tcur.inject(network, config))
    path = tcur.save_adapter(model, tmp_path / "adapter.safetensors")
    plain = tcur.inject(copy.deepcopy(base), replace(config, orthonormal=False))
    assert path.stat().st_size < 1.02 * tcur.save_adapter(plain, tmp_path / "plain.safetensors").stat().st_size
    assert torch.equal(tcur.load_adapter(copy.deepcopy(base), path)(x), model(x))
    other = tcur.inject(copy.deepcopy(base), config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_file_of_the_other_kind_onto_an_adapted_model(
    network: nn.Module, config: tcur.TCURConfig, train: Callable[..., Any], x: Tensor, tmp_path: Path
) -> None:
    base = copy.deepcopy(network)
    configs = config, replace(config, orthonormal=False)
    for own, other in (configs, configs[::-1]):
        saved = train(tcur.inject(copy.deepcopy(base), other))
        model = train(tcur.inject(copy.deepcopy(base), own))
        tcur.load_adapter(model, tcur.save_adapter(saved, tmp_path / "adapter.safetensors"))
        torch.testing.assert_close(model(x), saved(x), rtol=1e-6, atol=1e-6)
        for name, stack in tcur.stacks(model).items():
            assert stack.rides == tcur.stacks(saved)[name].rides


def test_a_bank_of_them_computes_what_each_alone_does(
    network: nn.Module, config: tcur.TCURConfig, train: Callable[..., Any], x: Tensor
) -> None:
    model = train(tcur.inject(network, config)).double()
    x = x.double()
    bank = tcur.AdapterBank(model, capacity=4)
    outputs = []
    for name in ("a", "b"):
        train(model)
        outputs.append(model(x))
        bank.add(name, model)
    with bank.use(["b", "a"]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.stack([outputs[1][0], outputs[0][1]]), rtol=1e-12, atol=1e-12)


def test_dependent_columns_are_named(network: nn.Module) -> None:
    with torch.no_grad():
        weight = network.blocks[0].mlp.linear1.weight
        weight[:, 1] = weight[:, 0]
    config = tcur.TCURConfig.preset("light", rank=8, orthonormal=True)
    with pytest.raises(ValueError, match=r"linear1.*the chosen columns cannot be made orthonormal: column \d"):
        tcur.inject(network, config)


def test_raw_factors_cannot_be_orthonormal() -> None:
    with pytest.raises(ValueError, match=r"orthonormal makes unit-norm factors, found scale 1\.0"):
        tcur.TCURConfig(scale=1.0, orthonormal=True)
