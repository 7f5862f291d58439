"""Selection from calibration activations: what is measured, what is chosen by it, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.maths.selection import select

CONFIG = tcur.TCURConfig(rank=2, selection="activation")


def inputs_of(model: Any, name: str, batches: list[Tensor]) -> Tensor:
    """All input tokens of a module, recorded by a hook of the test's own."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, out: seen.append(args[0].flatten(0, 1))
    )
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(seen).double()


def test_root_mean_squares_over_the_tokens_of_all_batches(network: Any) -> None:
    batches = [torch.randn(2, 5, 6), 3 * torch.randn(1, 7, 6)]
    found = tcur.calibrate(network, CONFIG, batches)
    assert len(found) == 8
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.linear2"):
        expected = inputs_of(network, name, batches).square().mean(0).sqrt()
        assert_close(found[name], expected.detach(), rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was(network: Any, state_of: Any, assert_unchanged: Any, x: Tensor) -> None:
    """Running statistics, modes and hooks included."""
    network.train()
    network.blocks[1].eval()
    before, random = state_of(network), torch.get_rng_state()
    tcur.calibrate(network, CONFIG, [x])
    assert_unchanged(network, before)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_batches_are_called_as_the_model_wants(x: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return self.a(factor * x)

    config = tcur.TCURConfig(rank=1, target_modules=["a"], selection="activation")
    one, two, named = (tcur.calibrate(Two(), config, [b])["a"] for b in (x, (x, 2.0), {"x": x, "factor": 3.0}))
    assert_close(two, 2 * one)
    assert_close(named, 3 * one)


def test_inject_chooses_by_the_rule_slice_by_slice(network: Any, x: Tensor) -> None:
    plain = copy.deepcopy(network)
    calibration = tcur.calibrate(network, CONFIG, [x])
    tcur.inject(network, CONFIG, calibration)
    stack = tcur.stacks(network)["8x8"]
    names = [name.partition("[")[0] for name in stack.names]
    weights = torch.cat(
        [plain.get_submodule(name).weight.detach().unflatten(0, (-1, 8)) for name in dict.fromkeys(names)]
    )
    expected = select(weights, 2, 2, "activation", inputs=torch.stack([calibration[name] for name in names]))
    assert torch.equal(stack.columns, expected.columns)
    assert torch.equal(stack.rows, expected.rows)
    assert stack.column_scores == expected.column_scores.tolist()


def test_inputs_decide(network: Any) -> None:
    """With the same weights, other inputs lead to another choice."""
    calibration = tcur.calibrate(network, CONFIG, [torch.randn(2, 5, 6)])
    for feature in (1, 6):
        loud = {name: rms.clone() for name, rms in calibration.items()}
        for rms in loud.values():
            rms[feature] = 1e3
        model = tcur.inject(copy.deepcopy(network), CONFIG, loud)
        assert [int(stack.columns[0]) for stack in tcur.stacks(model).values()] == [feature] * 3


def test_a_plain_state_that_comes_later_keeps_the_choice_and_gives_the_factors(
    network: Any, make_network: Any, x: Tensor
) -> None:
    tcur.inject(network, CONFIG, tcur.calibrate(network, CONFIG, [x]))
    columns = tcur.stacks(network)["16x8"].columns.clone()
    other = make_network()
    network.load_state_dict(other.state_dict())
    stack = tcur.stacks(network)["16x8"]
    assert torch.equal(stack.columns, columns)
    weights = torch.stack([block.mlp.linear1.weight.detach() for block in other.blocks])
    assert stack.is_of(weights)


@pytest.mark.parametrize(
    ("config", "calibration", "message"),
    [
        (CONFIG, None, r"stack 8x8 .*selection 'activation' found no calibration inputs"),
        (tcur.TCURConfig(rank=2), {}, "blocks.0.attn.qkv has no calibration inputs"),
        (CONFIG, {"blocks.0.attn.qkv": torch.ones(8)}, "blocks.0.attn.out_proj has no calibration inputs"),
        (CONFIG, {"blocks.0.attn.qkv": torch.ones(9)}, r"blocks.0.attn.qkv have shape \(9,\), expected \(8,\)"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused_and_changes_nothing(
    network: Any, config: Any, calibration: Any, message: str, state_of: Any, assert_unchanged: Any
) -> None:
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        tcur.inject(network, config, calibration)
    assert_unchanged(network, before)


def test_a_calibration_for_another_rule_is_refused(network: Any, x: Tensor) -> None:
    calibration = tcur.calibrate(network, CONFIG, [x])
    message = "selection 'norm' found calibration inputs; 'activation' needs them, other rules take none"
    with pytest.raises(ValueError, match=message):
        tcur.inject(network, tcur.TCURConfig(rank=2), calibration)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "none of the calibration batches reached it"), ([torch.full((1, 2, 6), torch.nan)], "NaN or infinite")],
)
def test_batches_that_say_nothing_are_refused(network: Any, batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=rf"blocks\.0\.attn\.qkv.*{message}"):
        tcur.calibrate(network, CONFIG, batches)
