"""The scale rule against its definition, by brute force over steps of random signs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tcurlora_ext.maths import folding, scale
from tcurlora_ext.maths.tproduct import dft_slices
from tcurlora_ext.maths.transforms import TRANSFORMS


def factors(slices: int, out: int = 9, inner: tuple[int, int] = (3, 2), in_: int = 7) -> tuple[Tensor, Tensor]:
    c, r = inner
    return torch.randn(slices, out, c, dtype=torch.float64), torch.randn(slices, r, in_, dtype=torch.float64)


@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_step_length_equals_the_sum_over_frequencies(slices: int) -> None:
    C, R = factors(slices)
    of_C = dft_slices(C).abs().square().sum((1, 2))
    of_R = dft_slices(R).abs().square().sum((1, 2))
    assert scale.step_length(C, R) == pytest.approx(math.sqrt(float((of_C * of_R).sum()) / slices), rel=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("slices", [1, 4, 5])
def test_step_length_is_the_root_mean_square_change_under_random_signs(slices: int, transform: str) -> None:
    """dW is linear in U: its mean square over independent signs is the sum over the unit cores."""
    C, R = factors(slices)
    shape = (slices, C.shape[2], R.shape[1])
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    changes = [folding.slice_product(folding.slice_product(C, U, transform), R, transform) for U in units]
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


def correlated(slices: int) -> tuple[Tensor, Tensor]:
    """Factors whose columns (rows) point in similar directions in every slice."""
    C, R = factors(slices, inner=(4, 3))
    return C + 2 * C[:, :, :1], R + 2 * R[:, :1]


@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("slices", [1, 4, 5])
def test_first_step_length_is_that_of_signs_of_gradients(slices: int, transform: str, domain: str) -> None:
    """By brute force: dense white gradients of all slices, through autograd."""
    C, R = correlated(slices)
    changes, steps = [], 400
    for _ in range(steps):
        core = torch.zeros(slices, 4, 3, dtype=torch.float64, requires_grad=True)
        U = core if domain == "slice" else folding.unfold_core(core, transform)
        delta = folding.slice_product(folding.slice_product(C, U, transform), R, transform)
        (gradient,) = torch.autograd.grad(delta, core, torch.randn_like(delta))
        step = gradient.sign() if domain == "slice" else folding.unfold_core(gradient.sign(), transform)
        change = folding.slice_product(folding.slice_product(C, step, transform), R, transform)
        changes.append(float(change.square().sum()) / slices)
    expected = math.sqrt(sum(changes) / steps)
    # DRAWS draws of S independent blocks: a few percent; random signs give a third of it.
    assert scale.first_step_length(C, R, transform, domain) == pytest.approx(expected, rel=0.15)
    assert scale.step_length(C, R, transform) < 0.7 * expected


def test_first_step_length_follows_the_arcsine_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """For S = 1 the mean is known: signs of Gaussians of correlation p have correlation (2/pi) asin p."""
    monkeypatch.setattr(scale, "DRAWS", 4000)
    C, R = correlated(1)
    grams = C[0].T @ C[0], R[0] @ R[0].T
    full = torch.kron(*grams)
    sizes = full.diag().sqrt()
    signs = 2 / math.pi * torch.asin((full / sizes / sizes[:, None]).clamp(-1, 1))
    assert scale.first_step_length(C, R) == pytest.approx(math.sqrt(float((full * signs).sum())), rel=0.01)


def test_orthogonal_columns_and_rows_step_as_random_signs_do() -> None:
    C, R = (torch.linalg.qr(torch.randn(9, n, dtype=torch.float64)).Q for n in (4, 3))
    C, R = C[None], R.T[None]
    assert scale.first_step_length(C, R) == pytest.approx(scale.step_length(C, R), rel=1e-9)


def test_parallel_columns_and_rows_step_as_far_as_they_can() -> None:
    C, R = torch.randn(1, 9, 1, dtype=torch.float64), torch.randn(1, 1, 7, dtype=torch.float64)
    c, r = 6, 5
    found = scale.first_step_length(C.expand(1, 9, c), R.expand(1, r, 7))
    assert found == pytest.approx(c * r * float(C.norm() * R.norm()), rel=1e-9)


def test_the_stabilised_scale_and_the_default_are_one_at_rank_one() -> None:
    C, R = factors(1, inner=(1, 1))
    assert scale.default_scale(C, R, rank_stabilised=True) == pytest.approx(scale.default_scale(C, R))


def test_normalised_factors_have_unit_norm_over_all_slices_and_keep_zeros_and_dtype() -> None:
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
    with pytest.raises(ValueError, match="all zero"):
        scale.default_scale(C, torch.zeros_like(R), rank_stabilised=True)
