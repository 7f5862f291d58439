"""What every transform along the slices has to answer, and the answers of one whose blocks do not couple.

A transform multiplies a factor (S, m, n) along its slices by one real orthogonal matrix (S, S). The S *blocks* that
come out are what the operator computes with. Some are coupled in pairs by a phase (the real and the imaginary part of a
frequency), the others stand alone.
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
        calls: How many calls it takes, each for as many of the layer's slices as any other.
        blocks: The first dimension of the core in each of them.
        transform: The name of the folding in each of them.
    """

    calls: int
    blocks: int
    transform: str


class SliceTransform:
    """A transform along the slices, without state; :data:`tcurlora_ext.maths.transforms.TRANSFORMS` has one of each.

    A real orthogonal transform whose blocks stand alone says its ``name`` and its :meth:`matrix` and nothing else.

    Attributes:
        name: As options, files and the operator spell it.
        title: What it is, in a few words.
        has_kernels: Whether the native and the Triton kernels compute with its blocks; else PyTorch's operations do.
        has_frequencies: Whether its blocks are frequencies, over which energy can be listed.
        truncates: Whether a core may keep its lowest frequencies alone.
        shares_core: Whether all slices depend on all of the core; else every slice has a core of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    has_kernels: ClassVar[bool] = False
    has_frequencies: ClassVar[bool] = True
    truncates: ClassVar[bool] = False
    shares_core: ClassVar[bool] = True

    # -- the matrix ---------------------------------------------------------------------------------------------------

    def matrix(self, slices: int) -> Tensor:
        """The orthonormal matrix (S, S), float64."""
        raise NotImplementedError

    def norms(self, slices: int) -> Tensor:
        """What turns orthonormal blocks into those of ``row`` and ``col``: (S,) float64."""
        return torch.ones(slices, dtype=torch.float64)

    def column_signs(self, slices: int) -> Tensor:
        """The sign with which a block of ``col`` enters the real part of a product: (S,) float64."""
        return torch.ones(slices, dtype=torch.float64)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def single_blocks(self, slices: int) -> slice:
        """Where the blocks that stand alone lie among the S blocks."""
        return slice(0, slices)

    def pair_blocks(self, slices: int) -> slice:
        """Where the coupled blocks (real part, imaginary part) lie among the S blocks."""
        return slice(0, 0)

    def kept_blocks(self, slices: int, frequencies: int | None) -> int:
        """How many of the S blocks a core has: all of them, or those of its lowest ``frequencies`` (None: all)."""
        return slices

    def phases(self, slices: int, first_slice: int, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the blocks of the core are multiplied by in B_l, for the layers l from first_slice on.

        Returns:
            Of the single blocks (num_slices, blocks), then cosines and sines of the pairs (num_slices, pairs), float64.
        """
        empty = torch.empty(num_slices, 0, dtype=torch.float64)
        return self.matrix(slices)[:, first_slice : first_slice + num_slices].T.contiguous(), empty, empty

    # -- products -----------------------------------------------------------------------------------------------------

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of slice tensors under the transform: (S, m, p), (S, p, n) -> (S, m, n)."""
        return self.unfold(self.fold(a) @ self.fold(b))

    def product_at(self, a: Tensor, b: Tensor, layers: range) -> Tensor:
        """Only the slices ``layers`` of :meth:`product`: (S, m, p), (S, p, n) -> (len(layers), m, n).

        One product (m, p*S)(p*S, n) a slice, so that one layer of a large stack needs no memory for the others.
        """
        a, b = self.fold(a), self.fold(b)
        matrix = orthonormal(self, len(a)).to(a)
        return sum_over_blocks((matrix[:, layer, None, None] * a for layer in layers), b)

    def fold(self, tensor: Tensor, blocks: int | None = None) -> Tensor:
        """The orthonormal transform of (S, m, n), or only so many of its first blocks; in its dtype."""
        return along_slices(orthonormal(self, tensor.shape[0])[:blocks], tensor)

    def unfold(self, tensor: Tensor, slices: int | None = None) -> Tensor:
        """The inverse of :meth:`fold`: (S, m, n) from S blocks, or from fewer, of which the others are zero."""
        blocks = tensor.shape[0]
        return along_slices(orthonormal(self, slices or blocks)[:blocks].T, tensor)

    # -- energy -------------------------------------------------------------------------------------------------------

    def spectrum(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The orthonormal transform of (S, m, n) by frequency, and how often each frequency counts in the energy."""
        return self.fold(tensor), torch.ones(len(tensor), dtype=tensor.dtype, device=tensor.device)

    def inverse_spectrum(self, frequencies: Tensor, slices: int) -> Tensor:
        """The inverse of :meth:`spectrum`: (S, m, n), real."""
        return self.unfold(frequencies)

    def product_energy(self, slices: int) -> int:
        """What the two products of C * U * R multiply an energy by, for orthonormal spectra of the three."""
        return 1

    # -- the operator's calls -----------------------------------------------------------------------------------------

    def call_shape(self, slices: int, num_slices: int, blocks: int) -> CallShape:
        """How a layer of ``num_slices`` of the S slices calls the operator, with a core of ``blocks`` blocks."""
        return CallShape(1, slices, self.name)

    def calls(
        self, col: Tensor, core: Tensor, row: Tensor, slices: int, first_slice: int, num_slices: int, scale: float
    ) -> list[Factors]:
        """What the operator takes for some slices of a stack, one entry a call; as many as :meth:`call_shape` says."""
        return [Factors(col, core, row, first_slice, num_slices, scale, self.name)]


def along_slices(matrix: Tensor, tensor: Tensor) -> Tensor:
    """A matrix (k, S) applied along the first dimension of (S, ...), in the tensor's dtype and on its device."""
    return torch.tensordot(matrix.to(tensor), tensor, dims=1)


@constant
def orthonormal(transform: SliceTransform, slices: int) -> Tensor:
    """The transform's matrix, built once: (S, S) float64 on the CPU."""
    return transform.matrix(slices)


@constant
def spectrum_norms(transform: SliceTransform, slices: int) -> Tensor:
    """The transform's norms, built once: (S,) float64 on the CPU."""
    return transform.norms(slices)


@constant
def column_signs(transform: SliceTransform, slices: int) -> Tensor:
    """The transform's signs of the blocks of ``col``, built once: (S,) float64 on the CPU."""
    return transform.column_signs(slices)


@constant
def phase_table(
    transform: SliceTransform, slices: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`SliceTransform.phases` of all S layers, to multiply blocks by: (S, blocks or pairs, 1, 1) each.

    Kept on the device: copying waits for it and ends a graph capture.
    """
    return _as_factors(transform.phases(slices, 0, slices), device, dtype)


def phases_on(
    transform: SliceTransform, slices: int, first_slice: int, num_slices: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The phases of some layers, to multiply blocks by: views (num_slices, blocks or pairs, 1, 1) of one table."""
    if torch.compiler.is_compiling():  # which builds constants in the graph: those of these layers alone
        return _as_factors(transform.phases(slices, first_slice, num_slices), device, dtype)
    own = slice(first_slice, first_slice + num_slices)
    single, cos, sin = phase_table(transform, slices, device, dtype)
    return single[own], cos[own], sin[own]


def _as_factors(
    phases: tuple[Tensor, Tensor, Tensor], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    single, cos, sin = (t.to(device=device, dtype=dtype)[..., None, None] for t in phases)
    return single, cos, sin


def sum_over_blocks(lefts: Iterable[Tensor], right: Tensor) -> Tensor:
    """``sum_k left_k right_k`` for several lefts (S, m, p) and one right (S, p, n), as one product each."""
    return torch.stack([left.transpose(0, 1).flatten(1) @ right.flatten(0, 1) for left in lefts])
