"""What every implementation of the operator takes and returns, such as operator/backends/eager.py."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The gradients of x, weight, bias, col, core and row.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Factors(NamedTuple):
    """The adapter in one call of the operator; the fields are in the order of the operator's arguments.

    col (out, c*S), core (S, c, r) and row (r*S, in) are in the coordinates of the slice ``transform``: docs/maths.md
    derives this folding. The call computes ``num_slices`` of the stack's S slices, from ``first_slice`` on.
    """

    col: Tensor
    core: Tensor
    row: Tensor
    first_slice: int
    num_slices: int
    scale: float
    transform: str = "dft"


def required(tensor: Tensor | None, name: str) -> Tensor:
    """Return the tensor. Raises ValueError for None: a gradient needs the tensor, and it was not saved."""
    if tensor is None:
        raise ValueError(f"{name} was not saved for this gradient")
    return tensor
