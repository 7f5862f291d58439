"""The leading directions of a change: the best that a core of their rank can reach."""

from __future__ import annotations

import pytest
import torch

from tcurlora_ext.maths import learned
from tcurlora_ext.maths.learned import leading_directions, paired, unpaired
from tcurlora_ext.maths.transforms import TRANSFORMS


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("slices", [1, 2, 5])
def test_a_change_of_low_rank_is_made_again_exactly(transform: str, slices: int) -> None:
    along = TRANSFORMS[transform]
    left, core, right = (torch.randn(slices, *shape, dtype=torch.float64) for shape in ((12, 3), (3, 3), (3, 9)))
    change = along.product(along.product(left, core), right)
    found = leading_directions(change, (3, 3), along)
    C, R = along.unfold(found.left, slices), along.unfold(found.right, slices).mT
    spectra = [along.spectrum(t)[0] for t in (C, change, R)]
    best = along.inverse_spectrum(spectra[0] @ (spectra[0].mH @ spectra[1] @ spectra[2].mH) @ spectra[2], slices)
    torch.testing.assert_close(best, change)
    assert found.energy == pytest.approx(1)
    assert found.norm == pytest.approx(float(change.norm()))


def test_the_energy_is_that_of_the_largest_singular_values() -> None:
    change = torch.randn(1, 30, 20, dtype=torch.float64)
    s = torch.linalg.svdvals(change[0])
    found = leading_directions(change, (4, 6), TRANSFORMS["identity"])
    assert found.left.shape == (1, 30, 4)
    assert found.right.shape == (1, 20, 6)
    assert found.energy == pytest.approx(float(s[:4].square().sum() / s.square().sum()))


def test_of_the_lowest_frequencies_alone() -> None:
    change = torch.randn(6, 10, 8, dtype=torch.float64)
    found = leading_directions(change, (2, 2), TRANSFORMS["dft"], frequencies=2)
    assert found.left.shape == (3, 10, 2)
    whole = leading_directions(change, (2, 2), TRANSFORMS["dft"])
    torch.testing.assert_close(found.left, whole.left[:3])


def test_a_large_change_is_projected_to_the_same_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64))[0] for n in (120, 90))
    change = (left * torch.logspace(0, -3, 40, dtype=torch.float64) @ right.T)[None]
    exact = leading_directions(change, (4, 4), TRANSFORMS["identity"])
    monkeypatch.setattr(learned, "WHOLE_SVD", 0)
    state = torch.random.get_rng_state()
    found = leading_directions(change, (4, 4), TRANSFORMS["identity"])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(found.left[0] @ found.left[0].T, exact.left[0] @ exact.left[0].T, rtol=0, atol=1e-9)
    assert found.energy == pytest.approx(exact.energy, rel=1e-9)


def test_a_zero_change_and_one_of_too_low_a_rank_are_refused() -> None:
    along = TRANSFORMS["identity"]
    with pytest.raises(ValueError, match="the change is zero"):
        leading_directions(torch.zeros(1, 5, 4), (1, 1), along)
    change = torch.zeros(2, 5, 4)
    change[:, 0, 0] = 1
    change[0, 1, 1] = 1
    with pytest.raises(ValueError, match="rank 1 at slice 1, expected at least 2"):
        leading_directions(change, (2, 2), along)


@pytest.mark.parametrize("slices", [1, 2, 3, 6])
def test_the_parts_of_a_frequency_are_stacked_and_taken_apart(slices: int) -> None:
    along, blocks = TRANSFORMS["dft"], torch.randn(slices, 4, 2)
    parts = paired(blocks, along, slices)
    assert len(parts) == slices // 2 + 1
    assert torch.equal(unpaired(parts, along, slices, slices), blocks)
