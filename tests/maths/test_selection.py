"""The rows and columns that every rule chooses, and what does not change its choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.maths import reference, selection
from tcurlora_ext.maths.selection import RULES
from tcurlora_ext.maths.tproduct import dft_slices, tprod

rules = pytest.mark.parametrize("rule", list(RULES))
DETERMINISTIC = ("norm", "activation", "leverage", "deim")
DRAWN = tuple(rule for rule in RULES if rule not in DETERMINISTIC)


def tensor(slices: int = 4, out: int = 12, in_: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(slices, out, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def select(W: Tensor, c: int, r: int, rule: str = "norm", seed: int = 0) -> selection.Selection:
    """Select with calibration inputs of ones where the rule needs inputs."""
    inputs = torch.ones(W.shape[0], W.shape[2]) if rule == "activation" else None
    return selection.select(W, c, r, rule, seed, inputs)


def naive_norm(W: Tensor, c: int, r: int) -> tuple[list[int], list[int]]:
    """The paper's rule, computed by its formula for one frequency after another."""
    spectrum = dft_slices(W)
    of_column = [sum(float(spectrum[k][:, j].norm()) for k in range(W.shape[0])) for j in range(W.shape[2])]
    columns = sorted(range(W.shape[2]), key=lambda j: -of_column[j])[:c]
    of_row = [sum(float(spectrum[k][i, columns].norm()) for k in range(W.shape[0])) for i in range(W.shape[1])]
    return sorted(range(W.shape[1]), key=lambda i: -of_row[i])[:r], columns


def test_the_paper_rule_takes_the_golden_rows_and_columns(golden: dict[str, Tensor]) -> None:
    found = select(golden["W"], golden["columns"].numel(), golden["rows"].numel(), "norm")
    assert sorted(found.columns.tolist()) == sorted(golden["columns"].tolist())
    assert sorted(found.rows.tolist()) == sorted(golden["rows"].tolist())


@given(slices=st.integers(1, 7), out=st.integers(2, 9), in_=st.integers(2, 9), seed=st.integers(0, 500))
def test_norm_equals_the_naive_formula(slices: int, out: int, in_: int, seed: int) -> None:
    W = tensor(slices, out, in_, seed)
    c, r = 1 + seed % in_, 1 + (seed // 7) % out
    found = select(W, c, r, "norm")
    assert (found.rows.tolist(), found.columns.tolist()) == naive_norm(W, c, r)


def test_norm_scores_are_the_formula_also_for_more_columns_than_a_chunk() -> None:
    W = tensor(3, 5, 2 * selection.CHUNK + 3)
    expected = dft_slices(W).norm(dim=1).sum(0)
    assert_close(selection.column_scores(W), expected, rtol=1e-12, atol=0)
    columns = torch.tensor([4, 1, 130])
    assert_close(selection.row_scores(W, columns), dft_slices(W)[:, :, columns].norm(dim=2).sum(0), rtol=1e-12, atol=0)


def test_activation_scores_are_the_paper_rule_on_weights_times_inputs() -> None:
    W, inputs = tensor(3, 5, selection.CHUNK + 3), torch.rand(3, selection.CHUNK + 3, dtype=torch.float64)
    found = selection.select(W, 4, 2, "activation", inputs=inputs)
    expected = select(W * inputs[:, None], 4, 2)
    assert torch.equal(found.columns, expected.columns)
    assert_close(found.column_scores, expected.column_scores, rtol=1e-12, atol=0)
    # Rows by the weights alone, on the chosen columns.
    assert_close(found.row_scores, selection.row_scores(W, found.columns)[found.rows], rtol=0, atol=0)


def test_activation_takes_a_small_column_that_a_large_input_meets() -> None:
    W, inputs = tensor(), torch.ones(4, 10)
    W[:, :, 7] *= 0.1
    inputs[:, 7] = 100.0
    inputs[:, 2] = 0.0
    assert int(select(W, 10, 1).columns[-1]) == 7
    assert int(selection.select(W, 1, 1, "activation", inputs=inputs).columns) == 7
    assert int(selection.select(W, 10, 1, "activation", inputs=inputs).columns[-1]) == 2
    # Inputs that are the same in all layers multiply the paper's score: the rule of Wanda, |W_j| |x_j|.
    scores = selection.column_scores(W, inputs)
    assert_close(scores, selection.column_scores(W) * inputs[0].double(), rtol=1e-12, atol=1e-12)


def test_rows_are_scored_on_the_chosen_columns_only() -> None:
    W = torch.full((2, 4, 4), 1e-3, dtype=torch.float64)
    W[:, :, 0] = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)  # column 0 is taken
    W[:, 1, 1:] = 3.0  # row 1 is the largest as a whole, but not on column 0
    found = select(W, 1, 2, "norm")
    assert found.columns.tolist() == [0]
    assert found.rows.tolist() == [2, 3]


@rules
@pytest.mark.parametrize(("slices", "out", "in_", "c", "r"), [(1, 5, 7, 3, 5), (2, 6, 4, 4, 1), (5, 9, 9, 2, 3)])
def test_indices_are_different_in_range_and_best_first(
    rule: str, slices: int, out: int, in_: int, c: int, r: int
) -> None:
    found = select(tensor(slices, out, in_), c, r, rule)
    for indices, count, bound in ((found.rows, r, out), (found.columns, c, in_)):
        assert indices.dtype == torch.int64
        assert indices.shape == (count,)
        assert len(set(indices.tolist())) == count
        assert int(indices.min()) >= 0
        assert int(indices.max()) < bound
    assert found.row_scores.shape == (r,)
    assert found.column_scores.shape == (c,)
    assert found.row_scores.dtype == torch.float64
    if rule in ("norm", "leverage"):
        assert torch.equal(found.column_scores, found.column_scores.sort(descending=True).values)
        assert torch.equal(found.row_scores, found.row_scores.sort(descending=True).values)


@rules
def test_every_index_can_be_asked_for(rule: str) -> None:
    found = select(tensor(3, 6, 5), 5, 6, rule)
    assert sorted(found.rows.tolist()) == list(range(6))
    assert sorted(found.columns.tolist()) == list(range(5))


@pytest.mark.parametrize("rule", DETERMINISTIC)
def test_the_choice_moves_with_a_permutation_of_features(rule: str) -> None:
    W = tensor()
    p, q = torch.randperm(12), torch.randperm(10)
    found, moved = select(W, 3, 4, rule), select(W[:, p][:, :, q], 3, 4, rule)
    assert p[moved.rows].tolist() == found.rows.tolist()
    assert q[moved.columns].tolist() == found.columns.tolist()


@pytest.mark.parametrize("rule", DETERMINISTIC)
def test_the_choice_does_not_depend_on_size_dtype_or_a_cyclic_shift_of_slices(rule: str) -> None:
    W = tensor()
    found = select(W, 3, 4, rule)
    for other in (W.float(), 1000 * W, W.roll(1, 0), W.transpose(0, 2).contiguous().transpose(0, 2)):
        again = select(other, 3, 4, rule)
        assert torch.equal(found.rows, again.rows)
        assert torch.equal(found.columns, again.columns)


@rules
def test_the_same_seed_gives_the_same_choice(rule: str) -> None:
    W = tensor()
    first = select(W, 3, 4, rule, seed=7)
    torch.rand(5)  # the global generator takes no part
    again = select(W, 3, 4, rule, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [select(W, 3, 4, rule, seed=s) for s in range(8, 16)]
    different = any(other.columns.tolist() != first.columns.tolist() for other in others)
    assert different == (rule in DRAWN)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for rule in RULES:
        select(tensor(), 2, 2, rule)
    assert torch.equal(before, torch.get_rng_state())


def _drawn(W: Tensor, rule: str) -> tuple[list[int], list[int]]:
    """How often every column and every row came first in 400 draws."""
    columns, rows = [0] * W.shape[2], [0] * W.shape[1]
    for seed in range(400):
        found = select(W, 1, 1, rule, seed=seed)
        columns[int(found.columns[0])] += 1
        rows[int(found.rows[0])] += 1
    return columns, rows


def test_the_drawing_rules_prefer_what_they_say() -> None:
    """One of 6 columns and one of 6 rows have more energy than the others, with known shares."""
    W = torch.ones(2, 6, 6, dtype=torch.float64)
    # Energies of columns: 6 a; with factor f on one row and column the totals are known exactly below.
    f = 3.0
    W[:, :, 2] *= f
    W[:, 4, :] *= f
    energy = W.square().sum((0, 1))
    for rule, expected in (
        ("norm-sampled", energy / energy.sum()),
        ("inverse-norm", (1 / energy) / (1 / energy).sum()),
        ("uniform", torch.full((6,), 1 / 6, dtype=torch.float64)),
    ):
        columns, rows = _drawn(W, rule)
        # 400 draws: a share p is known to sqrt(p(1-p)/400) <= 0.025; four of those.
        assert abs(columns[2] / 400 - float(expected[2])) < 0.1, rule
        assert abs(rows[4] / 400 - float(expected[2])) < 0.1, rule
    assert _drawn(W, "norm-sampled")[0][2] > 2 * _drawn(W, "uniform")[0][2] > 4 * _drawn(W, "inverse-norm")[0][2]


@pytest.mark.parametrize("rule", ["norm-sampled", "inverse-norm", "norm", "leverage", "deim"])
def test_features_of_norm_zero_come_last(rule: str) -> None:
    W = tensor(3, 8, 8)
    W[:, :, [0, 1, 2, 3]] = 0
    W[:, [4, 5, 6, 7], :] = 0
    for seed in range(5):
        found = select(W, 4, 4, rule, seed=seed)
        assert set(found.columns.tolist()) == {4, 5, 6, 7}
        assert set(found.rows.tolist()) == {0, 1, 2, 3}


@rules
def test_weights_that_are_all_zero_still_give_different_indices(rule: str) -> None:
    found = select(torch.zeros(2, 5, 5), 3, 3, rule)
    assert len(set(found.columns.tolist())) == 3
    assert len(set(found.rows.tolist())) == 3


def low_rank_with_noise_features(slices: int = 4, rank: int = 2) -> Tensor:
    """A tensor of tubal rank 2, whose second direction is in few of its 14 columns and 12 rows."""
    left = torch.zeros(slices, 12, rank, dtype=torch.float64)
    right = torch.zeros(slices, rank, 14, dtype=torch.float64)
    left[0, :, 0], right[0, 0, :] = 1.0, 1.0
    generator = torch.Generator().manual_seed(3)
    left[:, [1, 5], 1] = torch.randn(slices, 2, dtype=torch.float64, generator=generator)
    right[:, 1, [3, 9]] = torch.randn(slices, 2, dtype=torch.float64, generator=generator)
    return tprod(left, right)


@pytest.mark.parametrize("rule", ["leverage", "deim"])
def test_an_exact_low_tubal_rank_is_reconstructed_from_the_chosen_features(rule: str) -> None:
    W = low_rank_with_noise_features()
    found = select(W, 2, 2, rule)
    assert_close(reference.cur_reconstruction(W, found.rows, found.columns), W, rtol=1e-9, atol=1e-9)
    # Not any choice does: most columns are alike.
    alike = reference.cur_reconstruction(W, torch.tensor([0, 2]), torch.tensor([0, 1]))
    assert not torch.allclose(alike, W, atol=1e-3)


@pytest.mark.parametrize("rule", ["norm", "leverage", "deim", "uniform"])
def test_a_generic_low_tubal_rank_is_reconstructed_by_any_rule(rule: str) -> None:
    W = tprod(tensor(6, 14, 3, seed=1), tensor(6, 3, 11, seed=2))
    found = select(W, 3, 3, rule)
    assert_close(reference.cur_reconstruction(W, found.rows, found.columns), W, rtol=1e-7, atol=1e-7)


def test_deim_passes_over_copies_that_norm_takes() -> None:
    W = tensor(3, 8, 6)
    W[:, :, 1] = 5 * W[:, :, 0]
    W[:, :, 2] = 4.9 * W[:, :, 0]
    assert set(select(W, 2, 2, "norm").columns.tolist()) == {1, 2}
    assert len({1, 2} & set(select(W, 4, 2, "deim").columns.tolist())) == 1


def test_half_precision_weights_are_scored_in_double() -> None:
    W = (tensor(4, 12, 10) * 3e3).half()  # squares overflow float16
    for rule in RULES:
        found = select(W, 3, 3, rule)
        again = select(W.double(), 3, 3, rule)
        assert torch.equal(found.columns, again.columns)
        assert torch.equal(found.rows, again.rows)
        assert bool(torch.isfinite(found.column_scores).all())


@pytest.mark.parametrize(("c", "r"), [(11, 1), (1, 13), (0, 1), (1, 0), (-1, 1)])
def test_counts_that_do_not_fit_are_refused(c: int, r: int) -> None:
    with pytest.raises(ValueError, match=f"choose {c} of 10 columns and {r} of 12 rows"):
        select(tensor(), c, r)


@pytest.mark.parametrize(
    ("rule", "inputs", "message"),
    [
        ("activation", None, "selection 'activation' found no calibration inputs"),
        (
            "norm",
            torch.ones(4, 10),
            "selection 'norm' found calibration inputs; 'activation' needs them, other rules take none",
        ),
        ("activation", torch.ones(4, 9), r"calibration inputs have shape \(4, 9\), expected \(4, 10\)"),
    ],
)
def test_inputs_are_for_activation_and_it_needs_them(rule: str, inputs: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selection.select(tensor(), 1, 1, rule, inputs=inputs)


def test_an_unknown_rule_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'largest' is unknown.*norm-sampled"):
        select(tensor(), 1, 1, "largest")
