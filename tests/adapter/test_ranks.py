"""Ranks by name, and within a parameter budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

import tcurlora_ext as tcur
from tcurlora_ext.analysis.plan import plan

PATTERNS = {"mlp.linear1": (3, 2), r".*\.\d+\.mlp\.linear2": 4, "linear2": 1}


def ranks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: stack.rank for name, stack in tcur.stacks(model).items()}


def test_names_choose_the_rank_of_a_stack(network: Any) -> None:
    tcur.inject(network, tcur.TCURConfig(rank=2, rank_pattern=PATTERNS))
    assert ranks(network) == {"8x8": (2, 2), "16x8": (3, 2), "8x16": (4, 4)}


def test_layers_of_one_stack_that_match_different_ranks_are_named(
    network: Any, state_of: Any, assert_unchanged: Any
) -> None:
    before = state_of(network)
    found = r"blocks\.0\.attn\.qkv rank \(c, r\) = \(2, 2\) and blocks\.0\.attn\.out_proj \(5, 3\).*stack_by='role'"
    with pytest.raises(ValueError, match=rf"stack 8x8 \(blocks\.0\.attn\.qkv, \.\.\.\): .*{found}"):
        tcur.inject(network, tcur.TCURConfig(rank=2, rank_pattern={"out_proj": (5, 3)}))
    assert_unchanged(network, before)
    tcur.inject(network, tcur.TCURConfig(rank=2, rank_pattern={"out_proj": (5, 3)}, stack_by="role"))
    assert sorted(ranks(network).values()) == [(2, 2), (2, 2), (2, 2), (5, 3)]


def test_a_pattern_that_matches_nothing_is_named(network: Any) -> None:
    with pytest.raises(ValueError, match=r"rank_pattern 'fc1' matches none of the 8 adapted modules, such as blocks"):
        tcur.inject(network, tcur.TCURConfig(rank_pattern={"fc1": 2}))


def test_a_rank_that_does_not_fit_its_stack_is_named(network: Any) -> None:
    with pytest.raises(ValueError, match=r"stack 16x8 .* \(c, r\) = \(9, 9\) does not fit 16 x 8"):
        tcur.inject(network, tcur.TCURConfig(rank=2, rank_pattern={"linear1": 9}))


def core_parameters(model: nn.Module) -> int:
    return sum(stack.core.numel() for stack in tcur.stacks(model).values())


@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
@pytest.mark.parametrize("budget", [12, 60, 100, 10_000])
def test_a_budget_bounds_the_parameters_of_all_cores(network: Any, budget: int, transform: str) -> None:
    tcur.inject(network, tcur.TCURConfig(budget=budget, transform=transform))
    assert core_parameters(network) <= budget
    for stack in tcur.stacks(network).values():
        c, r = stack.rank
        assert c == r
        assert r == min(stack.shape) or core_parameters(network) + stack.slices * (2 * r + 1) > budget


def test_a_budget_follows_the_spectra_of_the_weights(make_network: Any) -> None:
    """Of linear1 and linear2, equal in size, the one with a flat spectrum gets a larger rank than the rank-one one."""
    for flat, steep in (("linear1", "linear2"), ("linear2", "linear1")):
        model = make_network()
        for block in model.blocks:
            weight = block.mlp.get_submodule(steep).weight
            weight.data = weight.data[:, :1] @ weight.data[:1, :]
        shape = tuple(model.blocks[0].mlp.get_submodule(flat).weight.shape)
        tcur.inject(model, tcur.TCURConfig(budget=40, target_modules=["linear1", "linear2"]))
        found = {stack.shape: stack.rank[0] for stack in tcur.stacks(model).values()}
        assert found[shape] > found[shape[::-1]]


def test_a_budget_below_the_least_names_both_budgets_and_changes_nothing(
    network: Any, state_of: Any, assert_unchanged: Any
) -> None:
    before = state_of(network)
    with pytest.raises(ValueError, match="budget is 11 parameters, expected at least 12"):
        tcur.inject(network, tcur.TCURConfig(budget=11))
    assert_unchanged(network, before)


def test_weights_that_are_not_finite_are_named_before_their_spectrum_is_taken(network: Any) -> None:
    network.blocks[1].mlp.linear2.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stack 8x16 .*blocks\.1\.mlp\.linear2: 1 of 128 weights are NaN"):
        tcur.inject(network, tcur.TCURConfig(budget=100))


def test_a_plan_of_a_budget_needs_the_weights(network: Any) -> None:
    config = tcur.TCURConfig(budget=100)
    planned = {stack.name: stack.rank for stack in plan(network, config).stacks}
    assert planned == ranks(tcur.inject(copy.deepcopy(network), config))
    with pytest.raises(ValueError, match=r"spectra of the weights, but blocks\.0\.attn\.qkv is on the meta device"):
        plan(network.to("meta"), config)
