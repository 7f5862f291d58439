"""What an implementation of the operator takes and gives: the contract of operator/eager.py and kernels/operator.py."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Of x, weight, bias, col, core and row.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Factors(NamedTuple):
    """The adapter of one call, in the order of the operators' arguments; docs/maths.md has the folding.

    col (out, c*S), core (S, c, r) and row (r*S, in) in the coordinates of the slice ``transform``, for the slices
    first_slice, first_slice + 1, ... (num_slices of them) of the S of the stack.
    """

    col: Tensor
    core: Tensor
    row: Tensor
    first_slice: int
    num_slices: int
    scale: float
    transform: str = "dft"


def required(tensor: Tensor | None, name: str) -> Tensor:
    """The tensor; ValueError where it was not saved for a gradient that needs it."""
    if tensor is None:
        raise ValueError(f"{name} was not saved for this gradient")
    return tensor
