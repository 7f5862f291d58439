"""The middle product and its gradients as one batched product each, for backends that compute backward themselves.

Shapes: h (T, r*S); m and p (T, n, c*S), tokens first; core (S, c, r), folded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Factors
from .transforms import with_middle_product
from .transforms.base import mixing_on


class Groups:
    """The S blocks of one call of the operator in groups of w neighbours: w = 2 where pairs are coupled, else 1.

    Args:
        factors: The adapter in this call.
        dtype: In which grouped tensors are computed with.

    Attributes:
        groups, width: The number of groups, and w.
        mixing: The factors of :func:`mixing_on`, (groups, n, w*w, w), in the dtype of the core.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        core = factors.core
        self.slices, self.n, self.dtype = core.shape[0], factors.num_slices, dtype
        along = with_middle_product(factors.transform)
        self.mixing = mixing_on(along, self.slices, factors.first_slice, self.n, core.device, core.dtype)
        self.groups, self.width = self.mixing.shape[0], self.mixing.shape[-1]
        self._first = self.width - 1  # the position of block 0 among the groups' blocks

    def grouped(self, tensor: Tensor, dim: int) -> Tensor:
        """The S blocks along ``dim`` as groups*w blocks: neighbours fill the free halves of groups with a single block.

        What they are multiplied by is zero, and what is computed in their place is dropped by :meth:`by_block` and
        :meth:`ungrouped`.
        """
        if self.width == 1:
            return tensor
        parts = [tensor.narrow(dim, 0, 1), tensor]
        if self.slices % 2 == 0:
            parts.append(tensor.narrow(dim, self.slices - 1, 1))
        return torch.cat(parts, dim)

    def ungrouped(self, blocks: Tensor) -> Tensor:
        """The inverse of :meth:`grouped` along the first dimension: a tensor that owns its memory."""
        return blocks if self.width == 1 else blocks.narrow(0, self._first, self.slices).clone()

    def by_group(self, tensor: Tensor) -> Tensor:
        """h (T, r*S) -> (groups, T, w*r), or p (T, n, c*S) -> (groups, T, n*w*c), in ``dtype``."""
        size = tensor.shape[-1] // self.slices
        blocks = self.grouped(tensor.unflatten(-1, (self.slices, size)), -2)
        groups = blocks.unflatten(-2, (self.groups, self.width)).movedim(-3, 0)
        return groups.to(self.dtype, memory_format=torch.contiguous_format).flatten(2)

    def by_block(self, tensor: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """(groups, T, ..., w*size) -> (T, ..., S*size) in ``dtype``: a view, whose rows are contiguous."""
        joined = tensor.movedim(0, -2).to(dtype, memory_format=torch.contiguous_format)
        return joined.flatten(-2).narrow(-1, self._first * size, self.slices * size)


class GroupedMiddle(Groups):
    """The middle product of one call of the operator, by one batched product over groups of blocks.

    A group is w neighbouring blocks: w = 2 for a transform that couples pairs, else 1 (:func:`mixing_on`). On a GPU
    every operation is a kernel, so there are few: 3 for B, 3 for m, 2 for dh once p is grouped.

    Args:
        factors: The adapter in this call.
        dtype: In which B is kept and the products are computed; for the core's gradient at least float32.
    """

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        super().__init__(factors, dtype)
        core = factors.core
        _, self.c, self.r = core.shape
        self.scale = factors.scale
        self._mixing = self.mixing.flatten(1, 2)  # (groups, n*w*w, w)
        blocks = self.grouped(core, 0).reshape(self.groups, self.width, self.c * self.r)
        # (groups, n, i, j, c, r) -> the matrix of each group for all n slices, (groups, n*w*c, w*r).
        B = self._times_scale(self._mixing, blocks).view(self.groups, self.n, self.width, self.width, self.c, self.r)
        B = B.transpose(3, 4).to(dtype, memory_format=torch.contiguous_format)
        self.B = B.flatten(4, 5).flatten(1, 3)

    def _times_scale(self, a: Tensor, b: Tensor) -> Tensor:
        """``scale * a b`` in one operation; the tensor that it could add is ignored."""
        return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=self.scale)

    def forward(self, h: Tensor) -> Tensor:
        """m = scale * h B^T: (T, r*S) -> (T, n, c*S), in the dtype of h."""
        m = torch.bmm(self.by_group(h), self.B.mT)
        return self.by_block(m.unflatten(-1, (self.n, self.width * self.c)), self.c, h.dtype)

    def backward(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """dh = scale * p B, from p :meth:`by_group`: (groups, T, n*w*c) -> (T, r*S), in ``dtype``."""
        return self.by_block(torch.bmm(p, self.B), self.r, dtype)

    def core_gradient(self, p: Tensor, h: Tensor) -> Tensor:
        """The core's gradient (S, c, r) in the dtype of B, from p :meth:`by_group` and h (T, r*S)."""
        shape = (self.groups, self.n, self.width, self.c, self.width, self.r)
        products = torch.bmm(p.mT, self.by_group(h)).view(shape).transpose(3, 4)
        products = products.reshape(self.groups, -1, self.c * self.r)
        blocks = self._times_scale(self._mixing.mT.to(products.dtype), products).view(-1, self.c, self.r)
        return self.ungrouped(blocks)
