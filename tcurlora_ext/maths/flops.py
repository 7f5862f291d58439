"""FLOPs of one call of the operator, from its sizes: a product (a, b)(b, c) counts 2abc, sums and casts count nothing.

The middle product counts as the block-diagonal product that it is, whatever a backend saves on it.
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
        """x W^T; as many for g W and g^T x."""
        return 2 * self.T * self.n * self.out * self.in_

    def row_product(self) -> int:
        """h = x row^T; as many for dh row and dh^T x."""
        return 2 * self.T * self.r * self.S * self.in_

    def middle_product(self) -> int:
        """m = h B^T of all n slices; as many for dh = p B and the diagonal blocks of p^T h."""
        pairs = with_middle_product(self.transform).pair_blocks(self.S)
        # A block of m reads one block of h, the real or imaginary part of a pair both parts.
        blocks = self.S + pairs.stop - pairs.start
        return 2 * self.T * self.n * self.c * self.r * blocks

    def column_product(self) -> int:
        """m col^T; as many for p = g col and g^T m."""
        return 2 * self.T * self.n * self.c * self.S * self.out

    def forward(self) -> int:
        """Of the adapter, without the base."""
        return self.row_product() + self.middle_product() + self.column_product()

    def backward(self, needs: Sequence[bool], keeps_h: bool) -> int:
        """Of the adapter, without the base; h is computed again where it was not kept."""
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
        """Of the base: its part of dx, and dweight."""
        return (needs[0] + needs[1]) * self.base_product()
