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

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from .tproduct import tprod

TRANSFORMS = ("dft", "dct", "identity")


def _constant(build: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what ``build`` made, as ordinary CPU tensors whoever asks first.

    A first call under ``torch.inference_mode`` or a default device would otherwise leave inference or meta tensors for
    every later one. A compiled function builds its own: Dynamo enters neither the cache nor these contexts.
    """

    @lru_cache(maxsize=256)
    def kept(*arguments: Any) -> Any:
        with torch.inference_mode(False), torch.device("cpu"):
            return build(*arguments)

    @wraps(build)
    def constant(*arguments: Any) -> Any:
        return build(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return constant


@_constant
def _transform_matrix(slices: int, transform: str) -> Tensor:
    """The orthonormal slice transform (S, S), float64 on the CPU."""
    slot = torch.arange(slices, dtype=torch.float64)
    if transform == "identity":
        return torch.eye(slices, dtype=torch.float64)
    if transform == "dct":
        matrix = torch.cos(math.pi / slices * slot[:, None] * (slot[None, :] + 0.5)) * math.sqrt(2 / slices)
        matrix[0] /= math.sqrt(2)
        return matrix
    if transform != "dft":
        raise ValueError(f"transform {transform!r} is unknown, expected one of {', '.join(TRANSFORMS)}")
    k = torch.arange(1, (slices + 1) // 2)
    # k*l mod S in integers: the angle stays exact for any S and l.
    angle = ((k[:, None] * torch.arange(slices)) % slices).double() * (2 * math.pi / slices)
    pairs = math.sqrt(2 / slices) * torch.stack([angle.cos(), -angle.sin()], 1).flatten(0, 1)
    ends = [torch.ones_like(slot), 1 - 2 * (slot % 2)][: 2 - slices % 2]
    ends = [end[None] / math.sqrt(slices) for end in ends]
    return torch.cat([ends[0], pairs, *ends[1:]])


@_constant
def _spectrum_norms(slices: int, transform: str) -> Tensor:
    """What turns the orthonormal blocks into those of ``row`` and ``col`` (unnormalised for the DFT): (S,)."""
    norms = torch.ones(slices, dtype=torch.float64)
    if transform == "dft":
        norms.fill_(math.sqrt(slices / 2))
        norms[0] = math.sqrt(slices)
        if slices % 2 == 0:
            norms[-1] = math.sqrt(slices)
    return norms


def _along_slices(matrix: Tensor, tensor: Tensor) -> Tensor:
    return torch.tensordot(matrix.to(tensor), tensor, dims=1)


def kept_blocks(slices: int, frequencies: int | None) -> int:
    """How many of the S blocks of the DFT a core of the lowest frequencies has.

    Args:
        slices: S, how many slices there are.
        frequencies: K: those of 0, 1, ... K - 1; None: all.

    Returns:
        min(2K - 1, S), or S.
    """
    return slices if frequencies is None else min(2 * frequencies - 1, slices)


def fold_core(core: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """U -> its orthonormal slice transform.

    Args:
        core: (S, c, r).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: Only so many of the first blocks; None: all S. Without effect for the identity.

    Returns:
        (S or blocks, c, r), in its dtype.
    """
    if transform == "identity":
        return core
    return _along_slices(_transform_matrix(core.shape[0], transform)[:blocks], core)


def unfold_core(core_fourier: Tensor, transform: str = "dft", slices: int | None = None) -> Tensor:
    """The inverse of :func:`fold_core`.

    Args:
        core_fourier: (S, c, r), or fewer blocks; the others are taken as zero.
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        slices: S, where the core has fewer blocks.

    Returns:
        (S, c, r), in its dtype.
    """
    if transform == "identity":
        return core_fourier
    blocks = core_fourier.shape[0]
    return _along_slices(_transform_matrix(slices or blocks, transform)[:blocks].T, core_fourier)


def core_at(core_fourier: Tensor, layer: int, slices: int) -> Tensor:
    """The core of a DFT of all blocks that does in its slice 0 what a core of low frequencies does in slice ``layer``.

    (F, c, r) -> (F, c, r) with F = :func:`kept_blocks` < S: the phases of the layer, and the weights of S slices in
    place of those of F. An operator that knows of one number of slices alone then computes with F of them.
    """
    blocks = core_fourier.shape[0]
    single, cos, sin = phases_on(slices, layer, 1, "dft", core_fourier.device, core_fourier.dtype)
    pairs = (blocks - 1) // 2
    cos, sin = cos[0, :pairs], sin[0, :pairs]
    real, imaginary = core_fourier[1:].unflatten(0, (pairs, 2)).unbind(1)
    turned = torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], 1).flatten(0, 1)
    # Of the weights of S slices only the ratio to those of F is wanted, which the operator multiplies with.
    return torch.cat([single[0, :1] * math.sqrt(blocks) * core_fourier[:1], turned * math.sqrt(blocks / 2)])


def _fold(tensor: Tensor, transform: str, blocks: int | None) -> Tensor:
    slices = tensor.shape[0]
    matrix = _spectrum_norms(slices, transform)[:, None] * _transform_matrix(slices, transform)
    return _along_slices(matrix[:blocks], tensor)


def _unfold(blocks: Tensor, slices: int, transform: str) -> Tensor:
    matrix = _transform_matrix(slices, transform).T / _spectrum_norms(slices, transform)
    return _along_slices(matrix[:, : blocks.shape[0]], blocks)


def _column_signs(slices: int, transform: str, like: Tensor) -> Tensor:
    """-1 for the imaginary parts in ``col``, which enter the real part of a product with that sign: (S, 1, 1)."""
    signs = torch.ones(slices, 1, 1, dtype=like.dtype, device=like.device)
    if transform == "dft":
        signs[2 : 2 * ((slices + 1) // 2) - 1 : 2] = -1
    return signs


def fold_rows(R: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """R -> ``row``, block f holding part f of the spectrum.

    Args:
        R: (S, r, in).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: Only so many of the first blocks; None: all S.

    Returns:
        (r*S, in), or r times as many rows as blocks; in its dtype.
    """
    return _fold(R, transform, blocks).flatten(0, 1)


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
    return _unfold(row.unflatten(0, (blocks or slices, -1)), slices, transform)


def fold_columns(C: Tensor, transform: str = "dft", blocks: int | None = None) -> Tensor:
    """C -> ``col``, block f holding part f of the spectrum, imaginary parts negated.

    Args:
        C: (S, out, c).
        transform: ``"dft"``, ``"dct"`` or ``"identity"``.
        blocks: Only so many of the first blocks; None: all S.

    Returns:
        (out, c*S), or c times as many columns as blocks; in its dtype.
    """
    folded = _fold(C, transform, blocks) * _column_signs(C.shape[0], transform, C)[:blocks]
    return folded.transpose(0, 1).flatten(1)


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
    return _unfold(parts * _column_signs(slices, transform, parts)[: len(parts)], slices, transform)


def join_rows(rows: Sequence[Tensor], blocks: int) -> Tensor:
    """The folded form of [R1; R2; ...] from those of R1, R2, ..., each of so many blocks."""
    return torch.cat([row.unflatten(0, (blocks, -1)) for row in rows], 1).flatten(0, 1)


def join_columns(columns: Sequence[Tensor], blocks: int) -> Tensor:
    """The folded form of [C1 C2 ...] from those of C1, C2, ..., each of so many blocks."""
    return torch.cat([col.unflatten(1, (blocks, -1)) for col in columns], 2).flatten(1)


def slice_product(a: Tensor, b: Tensor, transform: str = "dft") -> Tensor:
    """The product of slice tensors under a transform: the t-product, its DCT twin, or slice by slice."""
    if transform == "dft":
        return tprod(a, b)
    return unfold_core(fold_core(a, transform) @ fold_core(b, transform), transform)


def slice_product_at(a: Tensor, b: Tensor, layers: range, transform: str = "dft") -> Tensor:
    """Only the slices ``layers`` of :func:`slice_product`: (S, m, p), (S, p, n) -> (len(layers), m, n).

    One product (m, p*S)(p*S, n) a slice, so that one layer of a large stack needs no memory for the others.
    """
    slices = a.shape[0]
    if transform == "identity":
        return a[layers.start : layers.stop] @ b[layers.start : layers.stop]
    if transform == "dct":
        a, b = fold_core(a, transform), fold_core(b, transform)
        matrix = _transform_matrix(slices, transform).to(a)
        lefts = [matrix[:, layer, None, None] * a for layer in layers]
    else:
        lefts = [a[(layer - torch.arange(slices)) % slices] for layer in layers]
    return torch.stack([left.transpose(0, 1).flatten(1) @ b.flatten(0, 1) for left in lefts])


@_constant
def _phases(slices: int, first_slice: int, num_slices: int, transform: str) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of B_l for the layers first_slice..+num_slices, float64 on the CPU.

    Returns ``single`` (num_slices, blocks that stand alone), ``cos`` and ``sin`` (num_slices, pairs), w included.
    """
    layer = torch.arange(first_slice, first_slice + num_slices)
    if transform == "dct":
        empty = torch.empty(num_slices, 0, dtype=torch.float64)
        return _transform_matrix(slices, "dct")[:, layer].T.contiguous(), empty, empty
    if transform != "dft":
        raise ValueError(f"transform {transform!r} has no middle product, expected 'dft' or 'dct'")
    alone = [torch.full((num_slices,), 1 / math.sqrt(slices), dtype=torch.float64)]
    if slices % 2 == 0:
        alone.append((1 - 2 * (layer % 2)).double() / math.sqrt(slices))
    k = torch.arange(1, (slices + 1) // 2)
    # k*l mod S in integers: the angle stays exact for any S and l.
    angle = ((layer[:, None] * k) % slices).double() * (2 * math.pi / slices)
    weight = math.sqrt(2 / slices)
    return torch.stack(alone, 1), weight * angle.cos(), weight * angle.sin()


@_constant
def phases_on(
    slices: int, first_slice: int, num_slices: int, transform: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """:func:`_phases` to multiply blocks by: (num_slices, blocks or pairs, 1, 1) each.

    Kept on the device: copying waits for it and ends a graph capture.
    """
    constants = _phases(slices, first_slice, num_slices, transform)
    return tuple(t.to(device=device, dtype=dtype)[..., None, None] for t in constants)


def pair_blocks(slices: int, transform: str) -> slice:
    """Where the coupled blocks (real part, imaginary part) lie among the S blocks."""
    return slice(1, 2 * ((slices + 1) // 2) - 1) if transform == "dft" else slice(0, 0)


def single_blocks(slices: int, transform: str) -> slice:
    """The blocks that stand alone: self-conjugate frequencies of the DFT (the ends), every block of the DCT."""
    if transform == "dct":
        return slice(0, slices)
    return slice(0, slices, slices - 1) if slices % 2 == 0 else slice(0, 1)


class MiddleBlocks:
    """B_l for some layers of a stack, block by block: what stands between h and m.

    ``single`` (num_slices, blocks, c, r) and ``pair`` (num_slices, pairs, 2c, 2r), in the dtype of ``core_fourier``.
    ``phases`` are those of :func:`phases_on` for these layers where the caller holds them.
    """

    def __init__(
        self,
        core_fourier: Tensor,
        first_slice: int,
        num_slices: int,
        transform: str = "dft",
        phases: tuple[Tensor, ...] | None = None,
    ) -> None:
        slices = core_fourier.shape[0]
        self.core_shape = core_fourier.shape
        self.transform = transform
        self.num_slices = num_slices
        self.single_at = single_blocks(slices, transform)
        self.pair_at = pair_blocks(slices, transform)
        if phases is None:
            phases = phases_on(slices, first_slice, num_slices, transform, core_fourier.device, core_fourier.dtype)
        self._single: Tensor
        self._cos: Tensor
        self._sin: Tensor
        self._single, self._cos, self._sin = phases
        self.single = self._single * core_fourier[self.single_at]
        real, imaginary = core_fourier[self.pair_at].unflatten(0, (-1, 2)).unbind(1)
        a = self._cos * real - self._sin * imaginary
        b = self._sin * real + self._cos * imaginary
        self.pair = torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)

    def core_gradient(self, single: Tensor, pair: Tensor) -> Tensor:
        """The gradient of the core (S, c, r) from those of ``single`` and ``pair``: the phases taken back."""
        _, c, r = self.core_shape
        alone = (self._single * single).sum(0)
        gradient = alone.new_empty(self.core_shape)
        gradient[self.single_at] = alone
        a = pair[..., :c, :r] + pair[..., c:, r:]
        b = pair[..., c:, :r] - pair[..., :c, r:]
        real = (self._cos * a + self._sin * b).sum(0)
        imaginary = (self._cos * b - self._sin * a).sum(0)
        gradient[self.pair_at] = torch.stack([real, imaginary], 1).flatten(0, 1)
        return gradient
