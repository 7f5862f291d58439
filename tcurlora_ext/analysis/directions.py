"""What a subspace is: the layers that it moves, how much of the learned change is in it, and where it lies beside W.

With the base weights there is also, for the left and the right directions, the cosine of the smallest principal angle
between their span and the span of as many of W's own leading singular vectors, at each frequency of the slice
transform: 1 where they share a direction, 0 where all of them are at right angles.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcurlora_ext.adapter.model.structure import base_weights, stacks
from tcurlora_ext.adapter.subspace import Subspace
from tcurlora_ext.maths.learned import leading_directions
from tcurlora_ext.maths.transforms import SliceTransform


@dataclass(frozen=True)
class DirectionsInspection:
    """The directions of one stack.

    Attributes:
        name: The stack's name in the subspace.
        names: The module of each slice.
        shape: (out, in) of a slice.
        rank: (c, r).
        energy: The share of the learned change's energy within the directions, 0 to 1.
        change: The Frobenius norm of the learned change over that of the weights.
        left_cosines: Of the left directions, per frequency, one value without frequencies; None without base weights.
        right_cosines: Of the right directions.
    """

    name: str
    names: list[str]
    shape: tuple[int, int]
    rank: tuple[int, int]
    energy: float
    change: float
    left_cosines: list[float] | None = None
    right_cosines: list[float] | None = None


@torch.no_grad()
def inspect_subspace(subspace: Subspace, model: nn.Module | None = None) -> list[DirectionsInspection]:
    """Inspect the stacks of a subspace.

    Args:
        subspace: The subspace.
        model: A model adapted over it, for the angles to the singular vectors of its base weights.
    """
    here = {} if model is None else {tuple(stack.names): stack for stack in stacks(model).values()}
    found = []
    for name, stack in subspace.stacks.items():
        cosines: tuple[list[float] | None, list[float] | None] = (None, None)
        if model is not None and stack.names in here:
            cosines = _cosines(subspace, name, base_weights(model, here[stack.names]))
        found.append(
            DirectionsInspection(
                name, list(stack.names), stack.shape, stack.rank, stack.energy, stack.change, *cosines
            )
        )  # fmt: skip
    return found


def subspace_json(subspace: Subspace, found: list[DirectionsInspection]) -> dict[str, Any]:
    """What an inspection says of a subspace, as values that JSON can hold."""
    return {
        "digest": subspace.digest, "bits": subspace.bits, "bytes": subspace.nbytes, "parameters": subspace.parameters,
        "about": dict(subspace.about), "stacks": [asdict(one) for one in found],
    }  # fmt: skip


def _cosines(subspace: Subspace, name: str, weights: Tensor) -> tuple[list[float], list[float]]:
    """The cosines of a stack's left and of its right directions, given its base weights (S, out, in)."""
    stack, config = subspace.stacks[name], subspace.config
    along, slices = config.along, len(stack.names)
    learned = subspace.factors(stack.names, stack.rank, weights, config, exact=False)
    of_weights = leading_directions(weights, stack.rank, along, config.frequencies)
    pairs = ((learned.C, of_weights.left), (learned.R.mT, of_weights.right))
    left, right = (
        _smallest_angles(own, along.unfold(theirs, slices), along, config.frequencies) for own, theirs in pairs
    )
    return left, right


def _smallest_angles(own: Tensor, theirs: Tensor, along: SliceTransform, frequencies: int | None) -> list[float]:
    """The cosine of the smallest principal angle between two factors (S, n, k) at every frequency."""
    A, B = (along.spectrum(factor.double())[0][:frequencies] for factor in (own, theirs))
    return torch.linalg.svdvals(A.mH @ B)[:, 0].clamp(max=1).tolist()
