"""FLOPs of one call of the operator, from its sizes: a product (a, b)(b, c) counts 2abc, sums and casts count nothing.

The middle product counts as a block-diagonal product, even for a backend that computes it with fewer or more FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .transforms import with_middle_product


@dataclass(frozen=True)
class CallFlops:
    """One call with T rows of x, on n slices of (out, in_) of a stack of S, with a core (S, c, r).

    ``needs`` says which gradients are computed, in the operator's order: x, weight, bias, col, core, row.
    """

    T: int
    n: int
    S: int
    out: int
    in_: int
    c: int
    r: int
    transform: str = "dft"

    def base_product(self) -> int:
        """FLOPs of x W^T; g W and g^T x take as many."""
        return 2 * self.T * self.n * self.out * self.in_

    def row_product(self) -> int:
        """FLOPs of h = x row^T; dh row and dh^T x take as many."""
        return 2 * self.T * self.r * self.S * self.in_

    def middle_product(self) -> int:
        """FLOPs of m = h B^T for all n slices; dh = p B and the diagonal blocks of p^T h take as many."""
        pairs = with_middle_product(self.transform).pair_blocks(self.S)
        # A single block of m reads one block of h; a block of a pair reads two, the real and the imaginary part.
        blocks = self.S + pairs.stop - pairs.start
        return 2 * self.T * self.n * self.c * self.r * blocks

    def column_product(self) -> int:
        """FLOPs of m col^T; p = g col and g^T m take as many."""
        return 2 * self.T * self.n * self.c * self.S * self.out

    def forward(self) -> int:
        """FLOPs of the adapter in forward; those of the base are not counted."""
        return self.row_product() + self.middle_product() + self.column_product()

    def backward(self, needs: Sequence[bool], keeps_h: bool) -> int:
        """FLOPs of the adapter in backward, without the base; without ``keeps_h`` they include h computed again."""
        needs_x, _, _, needs_col, needs_core, needs_row = needs
        if not (needs_x or needs_col or needs_core or needs_row):
            return 0
        flops = self.column_product()  # p
        if (needs_col or needs_core) and not keeps_h:
            flops += self.row_product()
        if needs_core:
            flops += self.middle_product()
        if needs_col:
            flops += self.middle_product() + self.column_product()  # m again
        if needs_x or needs_row:
            flops += self.middle_product()  # dh
        return flops + (needs_x + needs_row) * self.row_product()

    def base_backward(self, needs: Sequence[bool]) -> int:
        """FLOPs of the base in backward: its part of dx, and dweight."""
        return (needs[0] + needs[1]) * self.base_product()


@dataclass(frozen=True)
class ConvolutionFlops:
    """One call of a convolution, whose weight is a matrix (out, in_): that many products of it with a vector, T.

    T counts the voxels of the output; of the input where the convolution is ``transposed``. C and R folded have the
    widths q_c and q_r. Products of matrices without voxels are not counted.
    """

    T: int
    out: int
    in_: int
    q_c: int
    q_r: int
    transposed: bool

    def base_product(self) -> int:
        """FLOPs of the layer's convolution; its dx takes as many."""
        return 2 * self.T * self.out * self.in_

    def row_product(self) -> int:
        """FLOPs of h; dh to dx take as many."""
        return 2 * self.T * self.q_r * self.in_

    def middle_product(self) -> int:
        """FLOPs of m; dh and dmix take as many. A convolution that is not transposed has B in its columns."""
        return 2 * self.T * self.q_c * self.q_r if self.transposed else 0

    def column_product(self) -> int:
        """FLOPs of y += m C; its gradients take as many each."""
        return 2 * self.T * self.out * (self.q_c if self.transposed else self.q_r)

    def forward(self) -> int:
        """FLOPs of the adapter in forward; those of the base are not counted."""
        return self.row_product() + self.middle_product() + self.column_product()

    def backward(self, keeps_h: bool) -> int:
        """FLOPs of the adapter in backward for dx and the core; without ``keeps_h`` they include h computed again."""
        # dh and dmix from g by the columns, which are one product of their own where B is not in them
        columns = self.column_product() * (1 if self.transposed else 2) + 2 * self.middle_product()
        return columns + self.row_product() * (1 if keeps_h else 2)


@dataclass(frozen=True)
class RidingFlops:
    """One call of the riding form with T rows of x, on a base (out, in_), with a core (c, r).

    ``needs`` says which gradients are computed: x, core, row.
    """

    T: int
    out: int
    in_: int
    c: int
    r: int

    def base_product(self) -> int:
        """FLOPs of x' W^T; d = g W takes as many."""
        return 2 * self.T * self.out * self.in_

    def row_product(self) -> int:
        """FLOPs of h = x R^T; dh R and dh^T x take as many."""
        return 2 * self.T * self.r * self.in_

    def core_product(self) -> int:
        """FLOPs of h U^T; p U and p^T h take as many."""
        return 2 * self.T * self.c * self.r

    def forward(self) -> int:
        """FLOPs of the adapter in forward; those of the base are not counted."""
        return self.row_product() + self.core_product()

    def backward(self, needs: Sequence[bool]) -> int:
        """FLOPs of the adapter in backward, from d = g W on."""
        needs_x, needs_core, needs_row = needs
        inner = needs_x or needs_row
        return (needs_core + inner) * self.core_product() + (needs_x + needs_row) * self.row_product()

    def base_backward(self, needs_x: bool, needs_adapter: bool) -> int:
        """FLOPs of the base in backward: d, or only its chosen features where the gradient of x is not needed."""
        if needs_x:
            return self.base_product()
        return 2 * self.T * self.out * self.c if needs_adapter else 0
