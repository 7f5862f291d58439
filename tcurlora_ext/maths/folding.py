"""The real folding: C, U and R of a stack as real matrices, so that no DFT is left at run time.

Along the slices every factor is multiplied by one real matrix, the *slice transform*:

``dft``
    The DFT of real slices in real coordinates. Frequency 0, then the real and the imaginary part of 1, 2, ..., then for
    even S frequency S/2: S blocks in all. A pair of parts is coupled by the phase.
``dct``
    The orthonormal DCT-II; S blocks that do not couple.
``identity``
    None: every slice has its own core (CURLoRA). Layers call the operator with S = 1.

Shapes: C (S, out, c) -> ``col`` (out, c*S); R (S, r, in) -> ``row`` (r*S, in); U (S, c, r) -> ``core_fourier`` (S, c,
r). For the DFT, ``row`` stacks [Re R_k; Im R_k] and ``col`` [Re C_k, -Im C_k], both unnormalised, while
``core_fourier`` is the orthonormal transform of U, so that a step on it is as long as the same step on U. With h = x
row^T, the middle product m = h B_l^T then gives x dW_l^T = m col^T. B_l is block-diagonal: ``w [[a, -b], [b, a]]`` with
a + ib = exp(2 pi i k l / S) (u_re + i u_im) and w = sqrt(2/S) for a pair, w = 1/sqrt(S) for a self-conjugate frequency
(the 1/S of the inverse DFT, the factor 2 of the conjugate half and the sqrt(S) of the orthonormal core in one number).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .transforms import SliceTransform, transform_named
from .transforms.base import along_slices, column_signs, orthonormal, spectrum_norms


def kept_blocks(slices: int, frequencies: int | None, transform: str = "dft") -> int:
    """How many of the S blocks a core of the lowest frequencies has.

    Args:
        slices: S, how many slices there are.
        frequencies: K: those of 0, 1, ... K - 1; None: all.
        transform: A name of :data:`tcurlora_ext.maths.transforms.TRANSFORMS`.

    Returns:
        For the DFT min(2K - 1, S), else S.
    """
    return transform_named(transform).kept_blocks(slices, frequencies)


def fold_core(core: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """U -> its orthonormal slice transform.

    Args:
        core: (S, c, r).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: Only so many of the first blocks; None: all S. Without effect for the identity.

    Returns:
        (S or blocks, c, r), in its dtype.
    """
    return transform_named(transform).fold(core, blocks)


def unfold_core(core_fourier: Tensor, transform: str = "dft", slices: int | None = None) -> Tensor:
    """The inverse of :func:`fold_core`.

    Args:
        core_fourier: (S, c, r), or fewer blocks; the others are taken as zero.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        slices: S, where the core has fewer blocks.

    Returns:
        (S, c, r), in its dtype.
    """
    return transform_named(transform).unfold(core_fourier, slices)


def _fold(tensor: Tensor, transform: SliceTransform, blocks: int | None) -> Tensor:
    slices = tensor.shape[0]
    matrix = spectrum_norms(transform, slices)[:, None] * orthonormal(transform, slices)
    return along_slices(matrix[:blocks], tensor)


def _unfold(blocks: Tensor, slices: int, transform: SliceTransform) -> Tensor:
    matrix = orthonormal(transform, slices).T / spectrum_norms(transform, slices)
    return along_slices(matrix[:, : blocks.shape[0]], blocks)


def _column_signs(transform: SliceTransform, slices: int, blocks: Tensor) -> Tensor:
    """The signs of these first blocks of ``col``: (blocks, 1, 1) in their dtype."""
    return column_signs(transform, slices).to(blocks)[: len(blocks), None, None]


def fold_rows(R: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """R -> ``row``, block f holding part f of the spectrum.

    Args:
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: Only so many of the first blocks; None: all S.

    Returns:
        (r*S, in), or r times as many rows as blocks; in its dtype.
    """
    return _fold(R, transform_named(transform), blocks).flatten(0, 1)


def unfold_rows(row: Tensor, slices: int, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """The inverse of :func:`fold_rows`.

    Args:
        row: (r*S, in), or r times as many rows as blocks.
        slices: S, how many slices there are.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many blocks it has; None: all S.

    Returns:
        (S, r, in), in its dtype.
    """
    return _unfold(row.unflatten(0, (blocks or slices, -1)), slices, transform_named(transform))


def fold_columns(C: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """C -> ``col``, block f holding part f of the spectrum, imaginary parts negated.

    Args:
        C: (S, out, c).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: Only so many of the first blocks; None: all S.

    Returns:
        (out, c*S), or c times as many columns as blocks; in its dtype.
    """
    along = transform_named(transform)
    folded = _fold(C, along, blocks)
    return (folded * _column_signs(along, C.shape[0], folded)).transpose(0, 1).flatten(1)


def unfold_columns(col: Tensor, slices: int, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """The inverse of :func:`fold_columns`.

    Args:
        col: (out, c*S), or c times as many columns as blocks.
        slices: S, how many slices there are.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many blocks it has; None: all S.

    Returns:
        (S, out, c), in its dtype.
    """
    parts = col.unflatten(1, (blocks or slices, -1)).transpose(0, 1)
    along = transform_named(transform)
    return _unfold(parts * _column_signs(along, slices, parts), slices, along)


def join_rows(rows: Sequence[Tensor], blocks: int) -> Tensor:
    """The folded form of [R1; R2; ...] from those of R1, R2, ..., each of so many blocks."""
    return torch.cat([row.unflatten(0, (blocks, -1)) for row in rows], 1).flatten(0, 1)


def join_columns(columns: Sequence[Tensor], blocks: int) -> Tensor:
    """The folded form of [C1 C2 ...] from those of C1, C2, ..., each of so many blocks."""
    return torch.cat([col.unflatten(1, (blocks, -1)) for col in columns], 2).flatten(1)


def slice_product(a: Tensor, b: Tensor, transform: str = "dft") -> Tensor:
    """The product of slice tensors under a transform: the t-product, its DCT twin, or slice by slice."""
    return transform_named(transform).product(a, b)


def slice_product_at(a: Tensor, b: Tensor, layers: range, transform: str = "dft") -> Tensor:
    """Only the slices ``layers`` of :func:`slice_product`: (S, m, p), (S, p, n) -> (len(layers), m, n)."""
    return transform_named(transform).product_at(a, b, layers)
