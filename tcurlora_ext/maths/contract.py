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


class Riding(NamedTuple):
    """An adapter that rides on the base product, in one call; the fields are in the order of the operator's arguments.

    For a slice whose C is columns of the layer's own weight, ``C = W[:, columns] diag(gain)``, a change of the layer's
    input takes the place of the product with C: docs/maths.md, "The riding form".

        x'[:, columns] = x[:, columns] + scale * h (diag(gain) U)^T,    h = x R^T,    y = x' W^T + bias

    Attributes:
        columns: J, the input features that are C's columns, (c,) int64, each once.
        core: U of all slices of the stack, (S, c, r), in at least float32.
        row: R of all slices, (r*S, in), in the dtype of x.
        gain: What C's columns are multiplied by, (c,), in the dtype of the core.
        slice_index: The layer's slice, from 0.
        scale: The factor of C U R.
    """

    columns: Tensor
    core: Tensor
    row: Tensor
    gain: Tensor
    slice_index: int
    scale: float

    @property
    def own_core(self) -> Tensor:
        """U of this slice, (c, r)."""
        return self.core[self.slice_index]

    @property
    def own_row(self) -> Tensor:
        """R of this slice, (r, in)."""
        slices, _, r = self.core.shape
        return self.row if slices == 1 else self.row[self.slice_index * r : (self.slice_index + 1) * r]

    @property
    def mixing(self) -> Tensor:
        """``scale * diag(gain) U`` of this slice, (c, r), in the dtype of the core: h to the change of x."""
        return self.own_core * (self.gain * self.scale).unsqueeze(1)


def required(tensor: Tensor | None, name: str) -> Tensor:
    """Return the tensor. Raises ValueError for None: a gradient needs the tensor, and it was not saved."""
    if tensor is None:
        raise ValueError(f"{name} was not saved for this gradient")
    return tensor
