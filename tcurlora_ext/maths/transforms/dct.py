"""The discrete cosine transform along the slices: one core for all slices, with S blocks that are not coupled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import SliceTransform


class DCT(SliceTransform):
    """``"dct"``: the orthonormal DCT-II."""

    name = "dct"
    title = "discrete cosine transform"
    has_kernels = True

    def matrix(self, slices: int) -> Tensor:
        slot = torch.arange(slices, dtype=torch.float64)
        matrix = torch.cos(math.pi / slices * slot[:, None] * (slot[None, :] + 0.5)) * math.sqrt(2 / slices)
        matrix[0] /= math.sqrt(2)
        return matrix
