"""The middle product in batched products of PyTorch: for groups too wide for one tile, and for rare gradients.

A group of more than 64 columns (r or c above 32 for the DFT) is a matrix that a library product fills. Shapes:
h (T, r*S), m and p (n, T, c*S), core (S, c, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcurlora_ext.maths.packing import MiddleBlocks


class WideMiddle:
    """B_l of n slices, block by block, with the scale folded in and rounded to the dtype of the data."""

    def __init__(
        self, core: Tensor, first_slice: int, num_slices: int, scale: float, transform: str, dtype: torch.dtype
    ) -> None:
        self.slices, self.c, self.r = core.shape
        self.scale = scale
        self.blocks = MiddleBlocks(core, first_slice, num_slices, transform)
        self.single = (scale * self.blocks.single).to(dtype)  # (n, blocks, c, r)
        self.pair = (scale * self.blocks.pair).to(dtype)  # (n, pairs, 2c, 2r)

    def _split(self, tensor: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(..., T, S*width) -> blocks alone (..., blocks, T, width) and pairs (..., pairs, T, 2*width)."""
        parts = tensor.unflatten(-1, (self.slices, width)).transpose(-3, -2)
        pairs = parts[..., self.blocks.pair_at, :, :].unflatten(-3, (-1, 2)).transpose(-3, -2).flatten(-2)
        return parts[..., self.blocks.single_at, :, :], pairs

    def _join(self, single: Tensor, pair: Tensor, width: int) -> Tensor:
        """The inverse of :meth:`_split`."""
        joined = single.new_empty(*single.shape[:-3], self.slices, single.shape[-2], width)
        joined[..., self.blocks.single_at, :, :] = single
        joined[..., self.blocks.pair_at, :, :] = pair.unflatten(-1, (2, width)).transpose(-3, -2).flatten(-4, -3)
        return joined.transpose(-3, -2).flatten(-2)

    def forward(self, h: Tensor) -> Tensor:
        """m_j = scale h B_j^T: (T, r*S) -> (n, T, c*S)."""
        single, pair = self._split(h, self.r)
        return self._join(single @ self.single.mT, pair @ self.pair.mT, self.c)

    def backward(self, p: Tensor) -> Tensor:
        """dh = scale sum_j p_j B_j: (n, T, c*S) -> (T, r*S)."""
        single, pair = self._split(p, self.c)
        return self._join((single @ self.single).sum(0), (pair @ self.pair).sum(0), self.r)

    def core_gradient(self, p: Tensor, h: Tensor) -> Tensor:
        """The gradient (S, c, r) of the core, summed in float32."""
        p_single, p_pair = self._split(p.float(), self.c)
        h_single, h_pair = self._split(h.float(), self.r)
        return self.scale * self.blocks.core_gradient(p_single.mT @ h_single, p_pair.mT @ h_pair)
