"""The middle product in operations that autograd differentiates: the blocks of B_l, and m = h B_l^T.

Shapes: h (T, r*S); m (T, n, c*S), tokens first; core (S, c, r), folded. :mod:`.grouped` is for backends, which have a
backward of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Factors
from .transforms import with_middle_product
from .transforms.base import phases_on


class MiddleBlocks:
    """The blocks of the block-diagonal B_l, with m = h B_l^T, for ``num_slices`` slices l of a stack.

    The blocks are ``single`` (num_slices, blocks, c, r) and ``pair`` (num_slices, pairs, 2c, 2r), in the dtype of
    ``core_fourier``. ``phases`` is the result of :func:`phases_on` for these slices, for a caller that has it already.
    """

    def __init__(
        self,
        core_fourier: Tensor,
        first_slice: int,
        num_slices: int,
        transform: str = "dft",
        phases: tuple[Tensor, ...] | None = None,
    ) -> None:
        slices, along = core_fourier.shape[0], with_middle_product(transform)
        self.core_shape = core_fourier.shape
        self.num_slices = num_slices
        self.single_at = along.single_blocks(slices)
        self.pair_at = along.pair_blocks(slices)
        if phases is None:
            phases = phases_on(along, slices, first_slice, num_slices, core_fourier.device, core_fourier.dtype)
        self._single: Tensor
        self._cos: Tensor
        self._sin: Tensor
        self._single, self._cos, self._sin = phases
        self.single = self._single * core_fourier[self.single_at]
        real, imaginary = core_fourier[self.pair_at].unflatten(0, (-1, 2)).unbind(1)
        a = self._cos * real - self._sin * imaginary
        b = self._sin * real + self._cos * imaginary
        self.pair = torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)


class BatchedMiddle:
    """The middle product of one call as two batched products, of singles and of pairs, with blocks in ``dtype``.

    Autograd saves views of h for it. One product over groups (:mod:`.grouped`) would make it save a copy.

    ``phases`` is passed on to :class:`MiddleBlocks`.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype, phases: tuple[Tensor, ...] | None = None) -> None:
        core = factors.core
        self.slices, self.c, self.r = core.shape
        self.n, self.scale = factors.num_slices, factors.scale
        self.blocks = MiddleBlocks(core, factors.first_slice, self.n, factors.transform, phases)
        # One matrix per block, for all n slices at once: (blocks, n*c, r) and (pairs, n*2c, 2r).
        self.single = (self.scale * self.blocks.single).transpose(0, 1).flatten(1, 2).to(dtype)
        self.pair = (self.scale * self.blocks.pair).transpose(0, 1).flatten(1, 2).to(dtype)

    def _split(self, tensor: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(T, ..., S*width) -> single blocks (blocks, T, ..., width) and pairs (pairs, T, ..., 2*width)."""
        parts = tensor.unflatten(-1, (self.slices, width))
        single = parts[..., self.blocks.single_at, :].movedim(-2, 0)
        pairs = parts[..., self.blocks.pair_at, :].flatten(-2).unflatten(-1, (-1, 2 * width)).movedim(-2, 0)
        return single, pairs

    def _join(self, single: Tensor, pair: Tensor, width: int) -> Tensor:
        """The inverse of :meth:`_split`, a new tensor (T, ..., S*width)."""
        single = single.movedim(0, -2)
        pairs = pair.movedim(0, -2).flatten(-2).unflatten(-1, (-1, width))
        # Order: the first single block, the pairs, then further single blocks: S/2 for even S, all others for the DCT.
        return torch.cat([single[..., :1, :], pairs, single[..., 1:, :]], -2).flatten(-2)

    def forward(self, h: Tensor) -> Tensor:
        """m = scale * h B^T: (T, r*S) -> (T, n, c*S)."""
        single, pair = self._split(h, self.r)
        single = torch.bmm(single, self.single.mT).unflatten(-1, (self.n, self.c))
        pair = torch.bmm(pair, self.pair.mT).unflatten(-1, (self.n, 2 * self.c))
        return self._join(single, pair, self.c)
