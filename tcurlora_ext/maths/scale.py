"""The scale of an adapter, so that one learning rate serves networks of any width and depth.

A random-sign step of size lr on U changes a slice of W by lr * rho in root mean square over the slices (Frobenius
norm), ``rho = sqrt((1/S) sum_k |C_k|_F^2 |R_k|_F^2)`` over the S frequencies. For raw columns and rows rho is about
``S r s^2 sqrt(out in)`` with s the weights' standard deviation: it differs by orders of magnitude between networks.
LoRA of rank r0 (B = 0, A Kaiming-uniform, alpha = r0) moves a layer by ``lr * sqrt(out r0 / 3)``. The default rule
divides the columns of C and the rows of R by their norm over the whole tube and sets
``scale = alpha * sqrt(out r0 / 3) / rho`` with r0 = 8: one number a stack.

The signs of a real first step are not random. Where the chosen columns (rows) are nearly parallel the step adds up
along them and is longer than the rule's, the more so the larger r is. The rank-stabilised rule therefore divides by the
length of a step along the signs of a gradient, in place of rho: see :func:`first_step_length`. It keeps a step from
growing with r, as alpha/sqrt(r) does for LoRA (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
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
        (S, out, c), in its dtype.
    """
    return _divided(C, torch.linalg.vector_norm(C, dim=(0, 1), keepdim=True, dtype=torch.float64))


def normalise_rows(R: Tensor) -> Tensor:
    """R with every row divided by its norm over slices and inputs; a zero row stays zero.

    Args:
        R: (S, r, in).

    Returns:
        (S, r, in), in its dtype.
    """
    return _divided(R, torch.linalg.vector_norm(R, dim=(0, 2), keepdim=True, dtype=torch.float64))


def _divided(tensor: Tensor, norms: Tensor) -> Tensor:
    return (tensor / torch.where(norms > 0, norms, 1.0)).to(tensor.dtype)


def step_length(C: Tensor, R: Tensor, transform: str = "dft", frequencies: int | None = None) -> float:
    """rho: the RMS over the slices of ``|dW_l|_F`` for a random-sign step of size 1 on U.

    Args:
        C: (S, out, c).
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        frequencies: U has the lowest few alone; None: all.

    Returns:
        rho, computed in float64.
    """
    slices, along = C.shape[0], transform_named(transform)
    blocks = along.kept_blocks(slices, frequencies)
    col = fold_columns(C.double(), transform, blocks).unflatten(1, (blocks, -1))
    row = fold_rows(R.double(), transform, blocks).unflatten(0, (blocks, -1))
    # Re and Im of a frequency act together, and the conjugate frequency once more.
    of_col = _of_frequency(col.square().sum((0, 2)), along)
    of_row = _of_frequency(row.square().sum((1, 2)), along)
    return math.sqrt(float((of_col * of_row).sum()) / slices)


def first_step_length(
    C: Tensor, R: Tensor, transform: str = "dft", core_domain: str = "fourier", frequencies: int | None = None
) -> float:
    """As :func:`step_length`, for the signs of the core's gradient where that of the weights is white noise.

    A gradient g of W reaches U as ``C_k^H g_k R_k^H``: entries of parallel columns or rows have one sign, and the step
    adds up along them. Mean over 8 seeded draws, for which white noise of the size of U does: with roots ``A A^H =
    C_k^H C_k`` and ``B B^H = R_k R_k^H``, ``A z_k B^H`` is distributed as the gradient.

    Args:
        C: (S, out, c).
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        core_domain: Where the signs are taken: ``"fourier"`` or ``"slice"``.
        frequencies: U has the lowest few alone; None: all.

    Returns:
        The root mean square of the lengths, computed in float64.
    """
    slices, along = C.shape[0], transform_named(transform)
    spectrum_C, spectrum_R = (along.spectrum(factor.double())[0][:frequencies] for factor in (C, R))
    of_C, of_R = spectrum_C.mH @ spectrum_C, spectrum_R @ spectrum_R.mH
    root_C, root_R = _root(of_C), _root(of_R)
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
        energy += float((weights * ((of_C @ parts) * (parts @ of_R).conj()).sum((1, 2)).real).sum())
    return math.sqrt(energy / DRAWS * (along.product_energy(slices) / slices))


def _root(gram: Tensor) -> Tensor:
    """A with ``A A^H = gram``, which is positive semidefinite: (..., n, n)."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()[..., None, :].to(vectors)


def _of_frequency(energy: Tensor, along: SliceTransform) -> Tensor:
    """Energies of the S real blocks -> of their frequencies, in the order of the blocks: of a pair the sum, twice."""
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
        C: (S, out, c), as the stack holds it: columns of unit norm.
        R: (S, r, in), as the stack holds it: rows of unit norm.
        alpha: Multiplies the rule.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        rank_stabilised: Divide by :func:`first_step_length` in place of rho.
        core_domain: ``"fourier"`` or ``"slice"``, for the rank-stabilised rule.
        frequencies: U has the lowest few alone; None: all.

    Returns:
        The scale.

    Raises:
        ValueError: C and R carry no energy.
    """
    length = step_length(C, R, transform, frequencies)
    if length > 0 and rank_stabilised:
        length = first_step_length(C, R, transform, core_domain, frequencies)
    if length == 0:
        raise ValueError("the chosen columns and rows are all zero: no core could change anything through them")
    return alpha * math.sqrt(C.shape[1] * LORA_RANK / 3) / length
