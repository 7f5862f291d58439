"""No transform: every slice has a core of its own, as in CURLoRA. Each call of the operator is for one slice."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Factors
from .base import CallShape, SliceTransform


class Identity(SliceTransform):
    """``"identity"``: slice by slice. The operator is called with stacks of one slice, whose DFT is the identity."""

    name = "identity"
    title = "no transform, one independent core per slice"
    has_kernels = True
    has_frequencies = False
    shares_core = False

    def matrix(self, slices: int) -> Tensor:
        return torch.eye(slices, dtype=torch.float64)

    def phases(self, slices: int, first_slice: int, num_slices: int) -> tuple[Tensor, Tensor, Tensor]:
        raise ValueError("transform 'identity' has no middle product over several slices")

    def fold(self, tensor: Tensor, blocks: int | None = None) -> Tensor:
        return tensor

    def unfold(self, tensor: Tensor, slices: int | None = None) -> Tensor:
        return tensor

    def product_at(self, a: Tensor, b: Tensor, layers: range) -> Tensor:
        return a[layers.start : layers.stop] @ b[layers.start : layers.stop]

    def call_shape(self, slices: int, num_slices: int, blocks: int) -> CallShape:
        return CallShape(num_slices, 1, "dft")

    def calls(
        self, col: Tensor, core: Tensor, row: Tensor, slices: int, first_slice: int, num_slices: int, scale: float
    ) -> list[Factors]:
        """One call per slice, with the slice's own columns of col and rows of row."""
        _, c, r = core.shape
        return [
            Factors(col[:, at * c : (at + 1) * c], core[at : at + 1], row[at * r : (at + 1) * r], 0, 1, scale)
            for at in range(first_slice, first_slice + num_slices)
        ]
