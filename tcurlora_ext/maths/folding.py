"""The real folding: C, U and R of a stack as real matrices, so that no DFT is left at run time.

Every factor is multiplied along its slices by one real matrix, the *slice transform*:

``dft``
    The DFT of real slices in real coordinates. Its S blocks are frequency 0, then the real and the imaginary part of
    frequencies 1, 2, ..., then for even S frequency S/2. The phase couples the two parts of a frequency.
``dct``
    The orthonormal DCT-II. No two of its S blocks are coupled.
``identity``
    No transform: every slice has its own core (CURLoRA). Layers call the operator with S = 1.

Shapes: C (S, out, c) -> ``col`` (out, c*S); R (S, r, in) -> ``row`` (r*S, in); U (S, c, r) -> ``core_fourier`` (S, c,
r). For the DFT, ``row`` stacks [Re R_k; Im R_k] and ``col`` [Re C_k, -Im C_k], both unnormalised. ``core_fourier`` is
the orthonormal transform of U, so that a step on it has the same length as the corresponding step on U.

With h = x row^T, the middle product m = h B_l^T then gives x dW_l^T = m col^T. B_l is block-diagonal with the blocks
``w [[a, -b], [b, a]]``, where a + ib = exp(2 pi i k l / S) (u_re + i u_im). The weight w is sqrt(2/S) for a pair and
1/sqrt(S) for a self-conjugate frequency: it contains the 1/S of the inverse DFT, the factor 2 for the conjugate half
and the sqrt(S) of the orthonormal core.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .transforms import SliceTransform, transform_named
from .transforms.base import along_slices, column_signs, orthonormal, spectrum_norms


def kept_blocks(slices: int, frequencies: int | None, transform: str = "dft") -> int:
    """How many of the S blocks a core has that keeps only the lowest frequencies.

    Args:
        slices: S, the number of slices.
        frequencies: K: the core keeps frequencies 0, 1, ..., K - 1; None: it keeps all.
        transform: A name of :data:`tcurlora_ext.maths.transforms.TRANSFORMS`.

    Returns:
        min(2K - 1, S) for the DFT, S for any other transform.
    """
    return transform_named(transform).kept_blocks(slices, frequencies)


def fold_core(core: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """The orthonormal slice transform of U.

    Args:
        core: U (S, c, r).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many of the first blocks to return; None: all S. Without effect for the identity.

    Returns:
        (blocks, c, r) in the dtype of ``core``, with S blocks where ``blocks`` is None.
    """
    return transform_named(transform).fold(core, blocks)


def unfold_core(core_fourier: Tensor, transform: str = "dft", slices: int | None = None) -> Tensor:
    """The inverse of :func:`fold_core`.

    Args:
        core_fourier: (S, c, r), or (fewer, c, r): missing blocks are taken as zero.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        slices: S; needed where the core has fewer blocks.

    Returns:
        (S, c, r), in the dtype of ``core_fourier``.
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
    """The signs of the first ``len(blocks)`` blocks of ``col``: (len(blocks), 1, 1) in the dtype of ``blocks``."""
    return column_signs(transform, slices).to(blocks)[: len(blocks), None, None]


def fold_rows(R: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """Fold R into ``row``: r rows for each block of its spectrum.

    Args:
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many of the first blocks to keep; None: all S.

    Returns:
        (r*blocks, in) in the dtype of R, with S blocks where ``blocks`` is None.
    """
    return _fold(R, transform_named(transform), blocks).flatten(0, 1)


def unfold_rows(row: Tensor, slices: int, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """The inverse of :func:`fold_rows`.

    Args:
        row: (r*blocks, in).
        slices: S, the number of slices.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many blocks ``row`` has; None: all S.

    Returns:
        (S, r, in), in the dtype of ``row``.
    """
    return _unfold(row.unflatten(0, (blocks or slices, -1)), slices, transform_named(transform))


def fold_columns(C: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """Fold C into ``col``: c columns for each block of its spectrum, imaginary parts negated.

    Args:
        C: (S, out, c).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many of the first blocks to keep; None: all S.

    Returns:
        (out, c*blocks) in the dtype of C, with S blocks where ``blocks`` is None.
    """
    along = transform_named(transform)
    folded = _fold(C, along, blocks)
    return (folded * _column_signs(along, C.shape[0], folded)).transpose(0, 1).flatten(1)


def unfold_columns(col: Tensor, slices: int, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """The inverse of :func:`fold_columns`.

    Args:
        col: (out, c*blocks).
        slices: S, the number of slices.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: How many blocks ``col`` has; None: all S.

    Returns:
        (S, out, c), in the dtype of ``col``.
    """
    parts = col.unflatten(1, (blocks or slices, -1)).transpose(0, 1)
    along = transform_named(transform)
    return _unfold(parts * _column_signs(along, slices, parts), slices, along)


def join_rows(rows: Sequence[Tensor], blocks: int) -> Tensor:
    """Fold [R1; R2; ...], given the folded forms of R1, R2, ..., each of ``blocks`` blocks."""
    return torch.cat([row.unflatten(0, (blocks, -1)) for row in rows], 1).flatten(0, 1)


def join_columns(columns: Sequence[Tensor], blocks: int) -> Tensor:
    """Fold [C1 C2 ...], given the folded forms of C1, C2, ..., each of ``blocks`` blocks."""
    return torch.cat([col.unflatten(1, (blocks, -1)) for col in columns], 2).flatten(1)


def slice_product(a: Tensor, b: Tensor, transform: str = "dft") -> Tensor:
    """The product of slice tensors under a transform: the t-product, its analogue for the DCT, or slice by slice."""
    return transform_named(transform).product(a, b)


def slice_product_at(a: Tensor, b: Tensor, layers: range, transform: str = "dft") -> Tensor:
    """The slices ``layers`` of :func:`slice_product` alone: (S, m, p), (S, p, n) -> (len(layers), m, n)."""
    return transform_named(transform).product_at(a, b, layers)
