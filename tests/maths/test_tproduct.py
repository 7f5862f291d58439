"""The t-product algebra against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.maths import tproduct
from tcurlora_ext.maths.reference import circular_convolution
from tcurlora_ext.maths.tproduct import dft_slices, tpinv, tprod, tsvd, ttranspose

SLICES = [1, 2, 3, 4, 5, 8]
sizes = st.integers(1, 6)


def identity(slices: int, n: int) -> Tensor:
    tensor = torch.zeros(slices, n, n, dtype=torch.float64)
    tensor[0] = torch.eye(n, dtype=torch.float64)
    return tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rank_deficient(slices: int, m: int, n: int, rank: int) -> Tensor:
    return tprod(random(slices, m, rank, seed=1), random(slices, rank, n, seed=2))


@given(slices=st.integers(1, 9), m=sizes, p=sizes, n=sizes, seed=st.integers(0, 1000))
def test_tprod_is_the_circular_convolution_of_slices(slices: int, m: int, p: int, n: int, seed: int) -> None:
    a, b = random(slices, m, p, seed=seed), random(slices, p, n, seed=seed + 1)
    expected = torch.zeros(slices, m, n, dtype=torch.float64)
    for i in range(slices):
        for j in range(slices):
            expected[(i + j) % slices] += a[i] @ b[j]
    assert_close(tprod(a, b), expected, rtol=1e-12, atol=1e-12)
    assert_close(circular_convolution(a, b), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slices", SLICES)
def test_tprod_is_associative_and_not_commutative(slices: int) -> None:
    a, b, c = random(slices, 3, 4, seed=1), random(slices, 4, 2, seed=2), random(slices, 2, 5, seed=3)
    assert_close(tprod(tprod(a, b), c), tprod(a, tprod(b, c)), rtol=1e-12, atol=1e-12)
    square, other = random(slices, 3, 3, seed=4), random(slices, 3, 3, seed=5)
    assert not torch.allclose(tprod(square, other), tprod(other, square))


@pytest.mark.parametrize("slices", SLICES)
def test_the_identity_tensor_is_neutral(slices: int) -> None:
    a = random(slices, 4, 3)
    assert_close(tprod(identity(slices, 4), a), a)
    assert_close(tprod(a, identity(slices, 3)), a)


@pytest.mark.parametrize("slices", SLICES)
def test_ttranspose_is_an_involution_that_reverses_products(slices: int) -> None:
    a, b = random(slices, 3, 4, seed=1), random(slices, 4, 2, seed=2)
    assert torch.equal(ttranspose(ttranspose(a)), a)
    assert_close(ttranspose(tprod(a, b)), tprod(ttranspose(b), ttranspose(a)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slices", SLICES)
def test_dft_slices_is_the_sum_with_minus_in_the_exponent(slices: int) -> None:
    a = random(slices, 2, 3)
    k = torch.arange(slices, dtype=torch.float64)
    matrix = torch.exp(-2j * torch.pi / slices * k[:, None] * k)
    assert_close(dft_slices(a), torch.einsum("kl,lmn->kmn", matrix, a.to(torch.complex128)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize(("m", "n", "rank"), [(4, 3, 3), (3, 5, 3), (5, 5, 2), (1, 1, 1)])
def test_tpinv_meets_the_four_penrose_conditions(slices: int, m: int, n: int, rank: int) -> None:
    a = rank_deficient(slices, m, n, rank)
    x = tpinv(a)
    close = {"rtol": 1e-9, "atol": 1e-9}  # the condition number of a random frequency, times 1e-16, with room
    assert x.shape == (slices, n, m)
    assert x.dtype == a.dtype
    assert_close(tprod(tprod(a, x), a), a, **close)
    assert_close(tprod(tprod(x, a), x), x, **close)
    assert_close(ttranspose(tprod(a, x)), tprod(a, x), **close)
    assert_close(ttranspose(tprod(x, a)), tprod(x, a), **close)


def test_tpinv_cuts_off_below_rtol() -> None:
    a = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))[None]
    assert_close(tpinv(a), torch.diag(torch.tensor([1.0, 1e3], dtype=torch.float64))[None])
    assert_close(tpinv(a, rtol=1e-2), torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))[None])


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize(("m", "n"), [(4, 3), (3, 5), (4, 4), (1, 3)])
def test_tsvd_reconstructs_from_orthogonal_real_factors(slices: int, m: int, n: int) -> None:
    a = random(slices, m, n)
    u, s, v = tsvd(a)
    k = min(m, n)
    assert not any(t.is_complex() for t in (u, s, v))
    assert (u.shape, s.shape, v.shape) == ((slices, m, k), (slices, k, k), (slices, n, k))
    assert_close(tprod(tprod(u, s), ttranspose(v)), a, rtol=1e-12, atol=1e-12)
    assert_close(tprod(ttranspose(u), u), identity(slices, k), rtol=1e-12, atol=1e-12)
    assert_close(tprod(ttranspose(v), v), identity(slices, k), rtol=1e-12, atol=1e-12)
    spectrum = dft_slices(s)
    assert_close(spectrum, torch.diag_embed(torch.diagonal(spectrum, dim1=1, dim2=2)), rtol=0, atol=1e-12)
    assert torch.diagonal(spectrum.real, dim1=1, dim2=2).min() > -1e-12


@pytest.mark.parametrize("slices", SLICES)
def test_self_conjugate_frequencies_are_their_own_negative(slices: int) -> None:
    assert tproduct.self_conjugate_frequencies(slices) == [k for k in range(slices) if k == -k % slices]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(2, 3, 4\) have no t-product"):
        tprod(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"\(1, 4, 3\) have no t-product"):
        tprod(torch.zeros(2, 3, 4), torch.zeros(1, 4, 3))  # would broadcast over the slices
    with pytest.raises(ValueError, match=r"b has shape \(3, 4\)"):
        tprod(torch.zeros(2, 3, 3), torch.zeros(3, 4))
    for function in (dft_slices, ttranspose, tpinv, tsvd):
        with pytest.raises(ValueError, match=r"\(3, 4\), expected three dimensions"):
            function(torch.zeros(3, 4))
