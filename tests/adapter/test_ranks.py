"""Ranks by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import tcurlora_ext as tcur

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
