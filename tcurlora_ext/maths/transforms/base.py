"""The interface of a transform along the slices; its defaults are those of a transform without coupled blocks.

A transform multiplies a factor (S, m, n) along its slices by one real orthogonal matrix (S, S). The operator computes
with the S *blocks* of the result. Some blocks are coupled in pairs by a phase, the real and the imaginary part of a
frequency. The others are single.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..constants import constant
from ..contract import Factors


class CallShape(NamedTuple):
    """How a layer of several slices calls the operator.

    Attributes:
        calls: How many calls it takes; the layer's slices are divided equally between them.
        blocks: The first dimension of the core in each call.
        transform: The name of the transform in each call.
    """

    calls: int
    blocks: int
    transform: str


class SliceTransform:
    """A transform along the slices. It has no state: :data:`tcurlora_ext.maths.transforms.TRANSFORMS` has one of each.

    A real orthogonal transform without coupled blocks defines ``name``, ``title`` and :meth:`matrix` and nothing else.

    Attributes:
        name: The name in options, files and the operator's arguments.
        title: A description in a few words.
        has_kernels: Whether the native and the Triton kernels support it; else PyTorch operations compute it.
        has_frequencies: Whether its blocks are frequencies, so that energy can be listed per frequency.
        truncates: Whether a core may keep the lowest frequencies alone.
        shares_core: Whether all slices depend on the whole core; else every slice has a core of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    has_kernels: ClassVar[bool] = False
    has_frequencies: ClassVar[bool] = True
    truncates: ClassVar[bool] = False
    shares_core: ClassVar[bool] = True

    # -- the matrix ---------------------------------------------------------------------------------------------------

    def matrix(self, slices: int) -> Tensor:
        """The orthonormal matrix (S, S), float64.

        Args:
            slices: S, how many slices the stack has.
        """
        raise NotImplementedError

    def norms(self, slices: int) -> Tensor:
        """Factors that turn orthonormal blocks into the blocks of ``row`` and ``col``: (S,) float64.

        Args:
            slices: S, how many slices the stack has.
        """
        return torch.ones(slices, dtype=torch.float64)

    def column_signs(self, slices: int) -> Tensor:
        """The sign of every block of ``col``, -1 where the real part of a product subtracts it: (S,) float64.

        Args:
            slices: S, how many slices the stack has.
        """
        return torch.ones(slices, dtype=torch.float64)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def single_blocks(self, slices: int) -> slice:
        """The positions of the single blocks among the S blocks.

        Args:
            slices: S, how many slices the stack has.
        """
        return slice(0, slices)

    def pair_blocks(self, slices: int) -> slice:
        """The positions of the coupled blocks (real part, imaginary part, real part, ...) among the S blocks.

        Args:
            slices: S, how many slices the stack has.
        """
        return slice(0, 0)

    def kept_blocks(self, slices: int, frequencies: int | None) -> int:
        """How many of the S blocks a core keeps that has the lowest ``frequencies`` alone (None: all).

        Args:
            slices: S, how many slices the stack has.
            frequencies: K, how many frequencies are kept; None: all.
        """
        return slices

    def phases(self, slices: int, first_slice: int, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
        """The factors by which B_l multiplies the blocks of the core, for the slices l from ``first_slice`` on.

        Args:
            slices: S, how many slices the stack has.
            first_slice: The first of the slices l.
            num_slices: How many there are.

        Returns:
            The factors of the single blocks (num_slices, blocks), then the cosines and the sines of the pairs, each
            (num_slices, pairs), float64.
        """
        empty = torch.empty(num_slices, 0, dtype=torch.float64)
        return self.matrix(slices)[:, first_slice : first_slice + num_slices].T.contiguous(), empty, empty

    # -- products -----------------------------------------------------------------------------------------------------

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of slice tensors under the transform: (S, m, p), (S, p, n) -> (S, m, n).

        Args:
            a: (S, m, p).
            b: (S, p, n).
        """
        return self.unfold(self.fold(a) @ self.fold(b))

    def product_at(self, a: Tensor, b: Tensor, layers: range) -> Tensor:
        """The slices ``layers`` of :meth:`product` alone: (S, m, p), (S, p, n) -> (len(layers), m, n).

        It takes one product (m, p*S)(p*S, n) per slice, so that one layer of a large stack needs no memory for others.

        Args:
            a: (S, m, p).
            b: (S, p, n).
            layers: The indices of the slices that are computed.
        """
        a, b = self.fold(a), self.fold(b)
        matrix = orthonormal(self, len(a)).to(a)
        return sum_over_blocks((matrix[:, layer, None, None] * a for layer in layers), b)

    def fold(self, tensor: Tensor, blocks: int | None = None) -> Tensor:
        """The orthonormal transform of a tensor (S, m, n), or its first ``blocks`` blocks, in the tensor's dtype.

        Args:
            tensor: (S, m, n).
            blocks: How many of the first blocks; None: all S.
        """
        return along_slices(orthonormal(self, tensor.shape[0])[:blocks], tensor)

    def unfold(self, tensor: Tensor, slices: int | None = None) -> Tensor:
        """The inverse of :meth:`fold`: (S, m, n) from S blocks, or from fewer: missing blocks are taken as zero.

        Args:
            tensor: (blocks, m, n).
            slices: S, where the tensor has fewer blocks.
        """
        blocks = tensor.shape[0]
        return along_slices(orthonormal(self, slices or blocks)[:blocks].T, tensor)

    # -- energy -------------------------------------------------------------------------------------------------------

    def spectrum(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The orthonormal transform of (S, m, n) by frequency, and the weight of each frequency in the energy.

        Args:
            tensor: (S, m, n), real.
        """
        return self.fold(tensor), torch.ones(len(tensor), dtype=tensor.dtype, device=tensor.device)

    def inverse_spectrum(self, frequencies: Tensor, slices: int) -> Tensor:
        """The inverse of :meth:`spectrum`: (S, m, n), real.

        Args:
            frequencies: As :meth:`spectrum` returns them.
            slices: S, how many slices the stack has.
        """
        return self.unfold(frequencies)

    def product_energy(self, slices: int) -> int:
        """The factor between ``|C * U * R|^2`` and the sum of ``|C_k U_k R_k|^2`` over orthonormal spectra.

        Args:
            slices: S, how many slices the stack has.
        """
        return 1

    # -- the operator's calls -----------------------------------------------------------------------------------------

    def own_cores(self, slices: int) -> bool:
        """Whether every slice of a stack has a core of its own, so that its adapter can ride on the base product.

        Args:
            slices: S, how many slices the stack has.
        """
        return not self.shares_core or (slices == 1 and self.has_kernels)

    def call_shape(self, slices: int, num_slices: int, blocks: int) -> CallShape:
        """How a layer with ``num_slices`` of the S slices calls the operator, for a core of ``blocks`` blocks.

        Args:
            slices: S, how many slices the stack has.
            num_slices: How many of them the layer has.
            blocks: The first dimension of the stack's core.
        """
        return CallShape(1, slices, self.name)

    def calls(
        self, col: Tensor, core: Tensor, row: Tensor, slices: int, first_slice: int, num_slices: int, scale: float
    ) -> list[Factors]:
        """The operator's arguments for some slices of a stack, one entry per call of :meth:`call_shape`.

        Args:
            col: (out, c*S).
            core: (S, c, r), or fewer blocks.
            row: (r*S, in).
            slices: S, how many slices the stack has.
            first_slice: The layer's first slice.
            num_slices: How many slices it has.
            scale: What C * U * R is multiplied by.
        """
        return [Factors(col, core, row, first_slice, num_slices, scale, self.name)]


def along_slices(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Apply a matrix (k, S) along the first dimension of a tensor (S, ...), in the tensor's dtype, on its device."""
    return torch.tensordot(matrix.to(tensor), tensor, dims=1)


@constant
def orthonormal(transform: SliceTransform, slices: int) -> Tensor:
    """The transform's matrix, cached: (S, S) float64 on the CPU."""
    return transform.matrix(slices)


@constant
def spectrum_norms(transform: SliceTransform, slices: int) -> Tensor:
    """The transform's norms, cached: (S,) float64 on the CPU."""
    return transform.norms(slices)


@constant
def column_signs(transform: SliceTransform, slices: int) -> Tensor:
    """The transform's signs of the blocks of ``col``, cached: (S,) float64 on the CPU."""
    return transform.column_signs(slices)


@constant
def phase_table(
    transform: SliceTransform, slices: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`SliceTransform.phases` of all S slices, shaped to multiply blocks: (S, blocks or pairs, 1, 1) each.

    The table is cached on the device: a copy to a GPU in each call would synchronise with it and break graph capture.
    """
    return _as_factors(transform.phases(slices, 0, slices), device, dtype)


def phases_on(
    transform: SliceTransform, slices: int, first_slice: int, num_slices: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The phases of some slices, shaped to multiply blocks: views (num_slices, blocks or pairs, 1, 1) of one table."""
    if torch.compiler.is_compiling():  # the graph computes its constants: only those of these slices
        return _as_factors(transform.phases(slices, first_slice, num_slices), device, dtype)
    own = slice(first_slice, first_slice + num_slices)
    single, cos, sin = phase_table(transform, slices, device, dtype)
    return single[own], cos[own], sin[own]


def mixing_on(
    transform: SliceTransform, slices: int, first_slice: int, num_slices: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The matrices that make the blocks of B_l from those of the core, for the middle product of all blocks at once.

    The blocks are taken in groups of w: w = 2 where the transform couples pairs, else 1. A single block of a transform
    with pairs is one half of a group whose other half is zero, so that all groups have one size.

    Returns:
        (groups, num_slices, w*w, w): entry [g, l, w*i + j, k] multiplies block k of group g of the core in row i and
        column j of the group's w x w blocks of B_l. A view of one table.
    """
    if torch.compiler.is_compiling():  # the graph computes its constants: only those of these slices
        return _as_mixing(transform.phases(slices, first_slice, num_slices)).to(device=device, dtype=dtype)
    return mixing_table(transform, slices, device, dtype)[:, first_slice : first_slice + num_slices]


@constant
def mixing_table(transform: SliceTransform, slices: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """:func:`mixing_on` for all S slices, cached on the device: (groups, S, w*w, w)."""
    return _as_mixing(transform.phases(slices, 0, slices)).to(device=device, dtype=dtype)


def _as_mixing(phases: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    single, cos, sin = phases
    if cos.shape[1] == 0:
        return single.T[..., None, None].contiguous()
    # B of a pair is [[a, -b], [b, a]] with a = cos re - sin im and b = sin re + cos im.
    pairs = torch.stack([cos, -sin, -sin, -cos, sin, cos, cos, -sin], -1)
    ends = single.new_zeros(*single.shape, 8)
    ends[:, 0, 7] = single[:, 0]  # the first block is the second of its group
    ends[:, 1:, 0] = single[:, 1:]  # the last block of an even number is the first of its group
    return torch.cat([ends[:, :1], pairs, ends[:, 1:]], 1).transpose(0, 1).unflatten(-1, (4, 2)).contiguous()


def _as_factors(
    phases: tuple[Tensor, Tensor, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    single, cos, sin = (t.to(device=device, dtype=dtype)[..., None, None] for t in phases)
    return single, cos, sin


def sum_over_blocks(lefts: Iterable[Tensor], right: Tensor) -> Tensor:
    """``sum_k left_k right_k`` for several ``lefts`` (S, m, p) and one ``right`` (S, p, n), one product per left."""
    return torch.stack([left.transpose(0, 1).flatten(1) @ right.flatten(0, 1) for left in lefts])
