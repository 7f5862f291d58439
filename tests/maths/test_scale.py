"""The scale rule against what it promises, by brute force over random-sign steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tcurlora_ext.maths import packing, scale
from tcurlora_ext.maths.tproduct import dft_slices


def factors(slices: int, out: int = 9, inner: tuple[int, int] = (3, 2), in_: int = 7) -> tuple[Tensor, Tensor]:
    c, r = inner
    return torch.randn(slices, out, c, dtype=torch.float64), torch.randn(slices, r, in_, dtype=torch.float64)


@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_step_length_equals_the_sum_over_frequencies(slices: int) -> None:
    C, R = factors(slices)
    of_C = dft_slices(C).abs().square().sum((1, 2))
    of_R = dft_slices(R).abs().square().sum((1, 2))
    assert scale.step_length(C, R) == pytest.approx(math.sqrt(float((of_C * of_R).sum()) / slices), rel=1e-12)


@pytest.mark.parametrize("transform", packing.TRANSFORMS)
@pytest.mark.parametrize("slices", [1, 4, 5])
def test_step_length_is_the_root_mean_square_change_under_random_signs(slices: int, transform: str) -> None:
    """The change is linear in U: over independent signs its mean square is the sum over the unit cores."""
    C, R = factors(slices)
    shape = (slices, C.shape[2], R.shape[1])
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    changes = [packing.slice_product(packing.slice_product(C, U, transform), R, transform) for U in units]
    mean_square = sum(float(delta.square().sum()) for delta in changes) / slices
    assert math.sqrt(mean_square) == pytest.approx(scale.step_length(C, R, transform), rel=1e-10)


@pytest.mark.parametrize("slices", [1, 4])
def test_the_default_scale_moves_a_layer_as_lora_of_rank_8_does(slices: int) -> None:
    C, R = factors(slices)
    expected = math.sqrt(C.shape[1] * 8 / 3)
    assert scale.default_scale(C, R) * scale.step_length(C, R) == pytest.approx(expected)
    assert scale.default_scale(C, R, alpha=4.0) == pytest.approx(4 * scale.default_scale(C, R))
    # The step does not depend on the size of the factors.
    step = scale.default_scale(100 * C, 7 * R) * scale.step_length(100 * C, 7 * R)
    assert step == pytest.approx(expected)


def test_normalised_factors_have_unit_norm_over_the_tube_and_keep_zeros_and_dtype() -> None:
    C, R = factors(4)
    C[:, :, 1] = 0
    R[:, 0, :] = 0
    unit_C, unit_R = scale.normalise_columns(C), scale.normalise_rows(R)
    torch.testing.assert_close(unit_C.square().sum((0, 1)), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(unit_R.square().sum((0, 2)), torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(unit_C[:, :, 0] * C[:, :, 0].norm(), C[:, :, 0])
    assert scale.normalise_columns(C.half()).dtype == torch.half
    assert bool(torch.isfinite(scale.normalise_columns(C.half())).all())


def test_factors_without_energy_have_no_scale() -> None:
    C, R = factors(3)
    with pytest.raises(ValueError, match="all zero"):
        scale.default_scale(torch.zeros_like(C), R)
