"""Ranks within a parameter budget: never above it, no stack could still grow, and larger where the energy is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tcurlora_ext.maths.budget import spread_budget
from tcurlora_ext.maths.folding import fold_core
from tcurlora_ext.maths.spectrum import energy_by_rank
from tcurlora_ext.maths.tproduct import dft_slices, tprod
from tcurlora_ext.maths.transforms import TRANSFORMS

STACKS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.floats(0, 10), min_size=1, max_size=6)), min_size=1, max_size=5
)


@given(stacks=STACKS, extra=st.integers(0, 300))
def test_the_total_is_within_the_budget_and_no_stack_could_still_grow(
    stacks: list[tuple[int, list[float]]], extra: int
) -> None:
    slices = [s for s, _ in stacks]
    energies = [sorted(e, reverse=True) for _, e in stacks]
    budget = sum(slices) + extra
    ranks = spread_budget(budget, slices, energies)
    total = sum(s * r * r for s, r in zip(slices, ranks, strict=True))
    assert total <= budget
    for s, r, e in zip(slices, ranks, energies, strict=True):
        assert 1 <= r <= len(e)
        assert r == len(e) or total + s * (2 * r + 1) > budget
    assert spread_budget(budget, slices, energies) == ranks


def test_the_next_step_goes_where_a_parameter_holds_the_most_energy() -> None:
    # Steps to rank 2 cost 3 and 6 parameters, the first stack's step to rank 3 costs 5: 9/3 > 12/6 > 5/5.
    energies = [[20.0, 9.0, 5.0], [20.0, 12.0, 1.0]]
    found = {budget: spread_budget(budget, [1, 2], energies) for budget in (3, 5, 6, 11, 12, 16, 17)}
    assert found == {3: [1, 1], 5: [1, 1], 6: [2, 1], 11: [3, 1], 12: [2, 2], 16: [2, 2], 17: [3, 2]}


def test_equal_stacks_stay_level_and_a_flat_one_gets_what_is_left() -> None:
    assert spread_budget(3 * 16 + 8, [1, 1, 1], [[1.0] * 9] * 3) == [4, 4, 4]
    assert spread_budget(2 * 9, [1, 1], [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]) == [3, 3]


def test_a_budget_below_rank_one_everywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="budget is 59 parameters, expected at least 60: rank 1 for every stack"):
        spread_budget(59, [48, 12], [[1.0], [1.0]])


@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_energy_by_rank_is_that_of_the_singular_values_of_every_frequency(slices: int) -> None:
    W = torch.randn(slices, 7, 5)
    expected = sum(torch.linalg.svdvals(matrix).square() for matrix in dft_slices(W.double())) / slices
    assert_close(energy_by_rank(W), expected, rtol=1e-10, atol=1e-10)
    assert_close(energy_by_rank(W.mT), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_ranks_hold_the_energy_of_the_weights(transform: str) -> None:
    W = torch.randn(4, 6, 9, dtype=torch.float64)
    energy = energy_by_rank(W, transform)
    assert energy.sum() == pytest.approx(float(W.square().sum()))
    assert torch.equal(energy, energy.sort(descending=True).values)
    if transform != "dft":
        expected = torch.linalg.svdvals(fold_core(W, transform)).square().sum(0)
        assert_close(energy, expected, rtol=1e-10, atol=1e-10)


def test_a_low_tubal_rank_has_no_energy_beyond_it() -> None:
    W = tprod(torch.randn(5, 8, 2, dtype=torch.float64), torch.randn(5, 2, 7, dtype=torch.float64))
    energy = energy_by_rank(W)
    assert float(energy[2:].sum()) < 1e-9 * float(energy.sum())
