"""The scale of an adapter, so that one learning rate serves networks of any width and depth.

Take a step of size lr on U with random signs. The Frobenius norm of the change that it makes to a slice of W, as the
root mean square over the slices, is lr * rho with ``rho = sqrt((1/S) sum_k |C_k|_F^2 |R_k|_F^2)`` over the S
frequencies. For raw columns and rows rho is about ``S r s^2 sqrt(out in)``, where s is the weights' standard deviation:
it differs by orders of magnitude between networks. LoRA of rank r0 (B = 0, A Kaiming-uniform, alpha = r0) changes a
layer by ``lr * sqrt(out r0 / 3)``. The default rule divides the columns of C and the rows of R by their norm over all
slices and sets ``scale = alpha * sqrt(out r0 / 3) / rho`` with r0 = 8: one scale per stack.

The signs of a real first step are not random. Where the chosen columns (rows) are nearly parallel, their parts of the
step add up, and the step is longer than the rule says; this grows with r. The rank-stabilised rule therefore divides by
the length of a step along the signs of a gradient in place of rho: see :func:`first_step_length`. It keeps the step
from growing with r, as alpha/sqrt(r) does for LoRA (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .folding import fold_columns, fold_rows
from .transforms import SliceTransform, transform_named

LORA_RANK = 8
DRAWS = 8


def normalise_columns(C: Tensor) -> Tensor:
    """C with every column divided by its norm over slices and outputs; a zero column stays zero.

    Args:
        C: (S, out, c).

    Returns:
        (S, out, c), in the dtype of C.
    """
    return (C / column_norms(C)).to(C.dtype)


def column_norms(C: Tensor) -> Tensor:
    """The norm of every column over slices and outputs; 1 for a zero column.

    Args:
        C: (S, out, c).

    Returns:
        (c,), float64.
    """
    return _nonzero(torch.linalg.vector_norm(C, dim=(0, 1), dtype=torch.float64))


def normalise_rows(R: Tensor) -> Tensor:
    """R with every row divided by its norm over slices and inputs; a zero row stays zero.

    Args:
        R: (S, r, in).

    Returns:
        (S, r, in), in the dtype of R.
    """
    return (R / _nonzero(torch.linalg.vector_norm(R, dim=(0, 2), keepdim=True, dtype=torch.float64))).to(R.dtype)


def _nonzero(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)


def step_length(C: Tensor, R: Tensor, transform: str = "dft", frequencies: int | None = None) -> float:
    """rho: the root mean square over the slices of ``|dW_l|_F`` for a step of size 1 and random signs on U.

    Args:
        C: (S, out, c).
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        frequencies: How many of the lowest frequencies U has; None: all.

    Returns:
        rho, computed in float64.
    """
    slices, along = C.shape[0], transform_named(transform)
    blocks = along.kept_blocks(slices, frequencies)
    col = fold_columns(C.double(), transform, blocks).unflatten(1, (blocks, -1))
    row = fold_rows(R.double(), transform, blocks).unflatten(0, (blocks, -1))
    # The real and the imaginary block of a pair each stand for a whole frequency: k itself and its conjugate S - k.
    col_energy = _frequency_energy(col.square().sum((0, 2)), along)
    row_energy = _frequency_energy(row.square().sum((1, 2)), along)
    return math.sqrt(float((col_energy * row_energy).sum()) / slices)


def first_step_length(
    C: Tensor, R: Tensor, transform: str = "dft", core_domain: str = "fourier", frequencies: int | None = None
) -> float:
    """As :func:`step_length`, for a step along the signs of the core's gradient where W's gradient is white noise.

    A gradient g of W gives U the gradient ``C_k^H g_k R_k^H``. Its entries for parallel columns or rows have the same
    sign, so that their parts of the step add up. The result is a mean over 8 seeded draws. A draw needs noise z only of
    the size of U: with the roots ``A A^H = C_k^H C_k`` and ``B B^H = R_k R_k^H``, ``A z_k B^H`` has the distribution of
    U's gradient.

    Args:
        C: (S, out, c).
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        core_domain: The domain in which the signs are taken: ``"fourier"`` or ``"slice"``.
        frequencies: How many of the lowest frequencies U has; None: all.

    Returns:
        The root mean square of the lengths, computed in float64.
    """
    slices, along = C.shape[0], transform_named(transform)
    spectrum_C, spectrum_R = (along.spectrum(factor.double())[0][:frequencies] for factor in (C, R))
    gram_C, gram_R = spectrum_C.mH @ spectrum_C, spectrum_R @ spectrum_R.mH
    root_C, root_R = _root(gram_C), _root(gram_R)
    generator = torch.Generator().manual_seed(0)
    energy = 0.0
    for _ in range(DRAWS):
        noise = torch.randn(slices, C.shape[2], R.shape[1], dtype=torch.float64, generator=generator).to(C.device)
        parts = along.spectrum(noise)[0][:frequencies]
        gradient = along.inverse_spectrum(root_C @ parts @ root_R.mH, slices)
        if core_domain == "slice":
            step = gradient.sign()
        else:
            kept = along.fold(gradient, along.kept_blocks(slices, frequencies))
            step = along.unfold(kept.sign(), slices)
        parts, weights = (t[:frequencies] for t in along.spectrum(step))
        energy += float((weights * ((gram_C @ parts) * (parts @ gram_R).conj()).sum((1, 2)).real).sum())
    return math.sqrt(energy / DRAWS * (along.product_energy(slices) / slices))


def _root(gram: Tensor) -> Tensor:
    """A with ``A A^H = gram`` for a positive semidefinite ``gram`` (..., n, n)."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()[..., None, :].to(vectors)


def _frequency_energy(energy: Tensor, along: SliceTransform) -> Tensor:
    """For the energy of every real block, the energy of its frequency: both blocks of a pair get the pair's sum."""
    pairs = along.pair_blocks(energy.shape[0])
    energy = energy.clone()
    energy[pairs] = energy[pairs].unflatten(0, (-1, 2)).sum(1).repeat_interleave(2)
    return energy


def default_scale(
    C: Tensor,
    R: Tensor,
    alpha: float = 1.0,
    transform: str = "dft",
    rank_stabilised: bool = False,
    core_domain: str = "fourier",
    frequencies: int | None = None,
) -> float:
    """``scale = alpha * sqrt(out r0 / 3) / rho``, the rule of this module.

    Args:
        C: (S, out, c) as the stack holds it, with columns of unit norm.
        R: (S, r, in) as the stack holds it, with rows of unit norm.
        alpha: Multiplies the rule.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        rank_stabilised: Divide by :func:`first_step_length` in place of rho.
        core_domain: ``"fourier"`` or ``"slice"``; matters for the rank-stabilised rule alone.
        frequencies: How many of the lowest frequencies U has; None: all.

    Returns:
        The scale.

    Raises:
        ValueError: C or R is zero.
    """
    length = step_length(C, R, transform, frequencies)
    if length > 0 and rank_stabilised:
        length = first_step_length(C, R, transform, core_domain, frequencies)
    if length == 0:
        raise ValueError("the chosen columns or rows are all zero: with them dW is zero for every core")
    return alpha * math.sqrt(C.shape[1] * LORA_RANK / 3) / length
