"""The real folding, and the blocks of B_l, against the complex definition that they replace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.maths import folding
from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.tproduct import dft_slices, tprod
from tcurlora_ext.maths.transforms import TRANSFORMS

SLICES = [1, 2, 3, 4, 5, 8, 12]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense_middle(core: Tensor, layer: int) -> Tensor:
    """B_l (c*S, r*S) of the unnormalised DFT of U, computed from the formula in complex numbers.

    dW_l = (1/S) sum_k exp(2 pi i k l / S) C_k U_k R_k over all S frequencies; a frequency between 0
    and S/2 also represents its conjugate, so its real part counts twice.
    """
    slices, c, r = core.shape
    spectrum = dft_slices(core)
    dense = torch.zeros(slices, c, slices, r, dtype=torch.float64)
    for k in range(slices // 2 + 1):
        block = spectrum[k] * torch.exp(torch.tensor(2j * math.pi * k * layer / slices, dtype=torch.complex128))
        if k == 0 or 2 * k == slices:
            at = 0 if k == 0 else slices - 1
            dense[at, :, at] = block.real / slices
        else:
            re, im = 2 * k - 1, 2 * k
            dense[re, :, re] = dense[im, :, im] = 2 / slices * block.real
            dense[re, :, im] = -2 / slices * block.imag
            dense[im, :, re] = 2 / slices * block.imag
    return dense.reshape(slices * c, slices * r)


def dense_from_blocks(blocks: MiddleBlocks, slices: int, c: int, r: int, n: int) -> Tensor:
    dense = torch.zeros(n, slices, c, slices, r, dtype=torch.float64)
    for i, at in enumerate(range(slices)[blocks.single_at]):
        dense[:, at, :, at] = blocks.single[:, i]
    for i, at in enumerate(range(slices)[blocks.pair_at][::2]):
        pair = blocks.pair[:, i].unflatten(-1, (2, r)).unflatten(-3, (2, c))
        dense[:, at : at + 2, :, at : at + 2] = pair
    return dense.reshape(n, slices * c, slices * r)


@transforms
@pytest.mark.parametrize("slices", SLICES)
def test_folding_is_undone_by_unfolding(slices: int, transform: str) -> None:
    core, R, C = double(slices, 3, 2), double(slices, 2, 5), double(slices, 6, 3)
    assert_close(folding.unfold_core(folding.fold_core(core, transform), transform), core, **CLOSE)
    row, col = folding.fold_rows(R, transform), folding.fold_columns(C, transform)
    assert row.shape == (2 * slices, 5)
    assert col.shape == (6, 3 * slices)
    assert_close(folding.unfold_rows(row, slices, transform), R, **CLOSE)
    assert_close(folding.unfold_columns(col, slices, transform), C, **CLOSE)


@transforms
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_joined_folds_are_the_folds_of_joined_factors(transform: str, blocks: int) -> None:
    first, second = double(5, 7, 2), double(5, 7, 3)
    expected = folding.fold_columns(torch.cat([first, second], 2), transform, blocks)
    folds = [folding.fold_columns(C, transform, blocks) for C in (first, second)]
    assert_close(folding.join_columns(folds, blocks), expected, **CLOSE)

    first, second = first.mT.contiguous(), second.mT.contiguous()
    expected = folding.fold_rows(torch.cat([first, second], 1), transform, blocks)
    folds = [folding.fold_rows(R, transform, blocks) for R in (first, second)]
    assert_close(folding.join_rows(folds, blocks), expected, **CLOSE)


@transforms
@pytest.mark.parametrize("slices", SLICES)
def test_the_transform_of_the_core_is_orthonormal(slices: int, transform: str) -> None:
    """A step on the folded core then has the same length as the corresponding step on U."""
    matrix = folding.fold_core(torch.eye(slices, dtype=torch.float64)[:, :, None], transform)[:, :, 0]
    assert_close(matrix @ matrix.T, torch.eye(slices, dtype=torch.float64), **CLOSE)
    core = double(slices, 3, 2)
    assert_close(folding.fold_core(core, transform).norm(), core.norm(), **CLOSE)


@pytest.mark.parametrize("slices", SLICES)
def test_the_parts_are_frequencies_in_the_documented_order(slices: int) -> None:
    """``row`` stacks [Re R_k; Im R_k], ``col`` [Re C_k, -Im C_k]: unnormalised, k = 0 first, S/2 last."""
    R, C = double(slices, 2, 5), double(slices, 4, 3)
    row = folding.fold_rows(R).unflatten(0, (slices, 2))
    col = folding.fold_columns(C).unflatten(1, (slices, 3)).transpose(0, 1)
    R_k, C_k = dft_slices(R), dft_slices(C)
    assert_close(row[0], R_k[0].real, **CLOSE)
    assert_close(col[0], C_k[0].real, **CLOSE)
    for k in range(1, (slices + 1) // 2):
        assert_close(row[2 * k - 1], R_k[k].real, **CLOSE)
        assert_close(row[2 * k], R_k[k].imag, **CLOSE)
        assert_close(col[2 * k - 1], C_k[k].real, **CLOSE)
        assert_close(col[2 * k], -C_k[k].imag, **CLOSE)
    if slices % 2 == 0:
        assert_close(row[-1], R_k[slices // 2].real, **CLOSE)
        assert_close(col[-1], C_k[slices // 2].real, **CLOSE)


@pytest.mark.parametrize("slices", SLICES)
def test_the_middle_blocks_equal_the_dense_formula(slices: int) -> None:
    core = double(slices, 3, 2)
    blocks = MiddleBlocks(folding.fold_core(core), 0, slices)
    dense = dense_from_blocks(blocks, slices, 3, 2, slices)
    for layer in range(slices):
        assert_close(dense[layer], dense_middle(core, layer), **CLOSE)


def test_the_middle_blocks_of_some_layers_are_those_of_all() -> None:
    core = folding.fold_core(double(7, 2, 3))
    every, some = MiddleBlocks(core, 0, 7), MiddleBlocks(core, 3, 2)
    assert torch.equal(some.single, every.single[3:5])
    assert torch.equal(some.pair, every.pair[3:5])


@given(slices=st.integers(1, 13), c=st.integers(1, 4), r=st.integers(1, 4), seed=st.integers(0, 1000))
def test_col_b_row_is_the_dense_delta(slices: int, c: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    C, U, R = double(slices, 5, c), double(slices, c, r), double(slices, r, 6)
    blocks = MiddleBlocks(folding.fold_core(U), 0, slices)
    dense = dense_from_blocks(blocks, slices, c, r, slices)
    delta = folding.fold_columns(C) @ dense @ folding.fold_rows(R)
    assert_close(delta, tprod(tprod(C, U), R), rtol=1e-11, atol=1e-11)


@transforms
@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_slice_product_at_gives_the_slices_asked_for(slices: int, transform: str) -> None:
    a, b = double(slices, 4, 3), double(slices, 3, 5)
    every = folding.slice_product(a, b, transform)
    for layers in (range(slices), range(slices - 1, slices), range(0, 1)):
        some = folding.slice_product_at(a, b, layers, transform)
        assert_close(some, every[layers.start : layers.stop], **CLOSE)


def test_slice_products_by_their_definitions() -> None:
    a, b = double(4, 2, 3), double(4, 3, 2)
    assert_close(folding.slice_product(a, b, "identity"), a @ b, **CLOSE)
    assert_close(folding.slice_product(a, b, "dft"), tprod(a, b), **CLOSE)
    k, slot = torch.arange(4.0, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    dct = math.sqrt(2 / 4) * torch.cos(math.pi / 4 * k[:, None] * (slot + 0.5))
    dct[0] /= math.sqrt(2)
    of_a, of_b = (torch.einsum("ks,smn->kmn", dct, t) for t in (a, b))
    assert_close(folding.slice_product(a, b, "dct"), torch.einsum("ks,kmn->smn", dct, of_a @ of_b), **CLOSE)


def test_the_phase_stays_exact_for_a_long_stack() -> None:
    """k*l reaches S^2. As it is reduced mod S in integers, the last slice's angle is as exact as the first's."""
    slices, layer = 1 << 14, (1 << 14) - 3
    core = torch.zeros(slices, 1, 1, dtype=torch.float64)
    core[1:-1:2] = 1.0  # real parts: a block is then w [[cos, -sin], [sin, cos]]
    pair = MiddleBlocks(core, layer, 1).pair[0]
    angle = [2 * math.pi * (k * layer % slices) / slices for k in range(1, slices // 2)]
    w = math.sqrt(2 / slices)
    expected = torch.tensor([[w * math.cos(a), w * math.sin(a)] for a in angle], dtype=torch.float64)
    assert_close(pair[:, :, 0], expected, rtol=0, atol=4e-16 * w * 10)


def test_constants_first_made_in_inference_mode_serve_training_later() -> None:
    """The transforms are cached: a cache filled in inference mode must not hold inference tensors."""
    slices = 94  # used by no other test, so that this is the first call
    core = double(slices, 2, 2).requires_grad_()
    with torch.inference_mode():
        MiddleBlocks(folding.fold_core(core), 0, 4)
    folding.fold_core(core).sum().backward()
    assert core.grad is not None
    blocks = MiddleBlocks(folding.fold_core(core), 0, 4)
    (blocks.single.sum() + blocks.pair.sum()).backward()


def test_constants_first_made_under_another_default_device_serve_the_cpu_later() -> None:
    core = double(106, 2, 2)  # used by no other test
    with torch.device("meta"):
        MiddleBlocks(folding.fold_core(core), 0, 4)
        folding.fold_rows(core)
        folding.fold_columns(core)
    assert_close(folding.unfold_core(folding.fold_core(core)), core, **CLOSE)
    assert MiddleBlocks(core, 0, 4).pair.device.type == "cpu"


@pytest.mark.parametrize("call", [lambda t: folding.fold_core(t, "fft"), lambda t: MiddleBlocks(t, 0, 1, "identity")])
def test_a_wrong_transform_is_named(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"transform '(fft|identity)'"):
        call(double(4, 2, 2))
