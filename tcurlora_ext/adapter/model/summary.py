"""The parameters and memory of an adapted model, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tcurlora_ext.io.table import text_table

from .coverage import Coverage, coverage
from .structure import CONTAINER, adapted_layers, require_adapted, stacks


@dataclass(frozen=True)
class StackSummary:
    """One stack of a :class:`Summary`.

    Attributes:
        name: The stack's name.
        slices: S, the number of slices.
        shape: (out, in) of a slice.
        rank: (c, r).
        q: Width of h = x row^T: r times the number of the core's blocks; r without a transform.
        scale: The factor of C * U * R.
        trained: The number of trained parameters in the stack.
        bytes: The memory of core and factors.
    """

    name: str
    slices: int
    shape: tuple[int, int]
    rank: tuple[int, int]
    q: int
    scale: float
    trained: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The stacks of a model and its numbers of parameters; ``str()`` formats them as a table.

    Attributes:
        stacks: One :class:`StackSummary` per stack.
        trained_beside: The number of trained parameters outside the stacks (a head, a decoder).
        frozen: The number of frozen parameters of the model; C and R are not counted.
        adapted: How many linear layers and convolutions are adapted.
        coverage: The share of the weights of these kinds that they have, 0 to 1 (convolutions where some are adapted).
        left_out: The names of those that are not adapted.
        covers: All weights, each with why it is left out.
        factors: What learned factors are, for people; "" where they are columns and rows of the weights.
    """

    stacks: tuple[StackSummary, ...]
    trained_beside: int
    frozen: int
    adapted: int
    coverage: float
    left_out: tuple[str, ...]
    covers: Coverage
    factors: str = ""

    @property
    def trained(self) -> int:
        """The number of all trained parameters."""
        return sum(stack.trained for stack in self.stacks) + self.trained_beside

    def __str__(self) -> str:
        header = ("stack", "slices", "out x in", "(c, r)", "q", "scale", "trained", "KiB")
        rows = [
            (s.name, str(s.slices), f"{s.shape[0]} x {s.shape[1]}", str(s.rank), str(s.q), f"{s.scale:.4g}",
             f"{s.trained:,}", f"{s.bytes / 1024:,.1f}")
            for s in self.stacks
        ]  # fmt: skip
        share = self.trained / max(1, self.trained + self.frozen)
        return (
            f"{text_table(header, rows)}\n"
            f"trained: {self.trained:,} of {self.trained + self.frozen:,} parameters ({share:.3%}), "
            f"{self.trained - self.trained_beside:,} in stacks, {self.trained_beside:,} outside them\n{self.covered}"
            + (f"\n{self.factors}" if self.factors else "")
        )

    @property
    def covered(self) -> str:
        """What is adapted and what is left out, in a line."""
        return str(self.covers)


def summary(model: nn.Module) -> Summary:
    """Count the parameters and memory of an adapted model.

    Args:
        model: An adapted model.

    Returns:
        Stacks, slices, q, trained parameters and bytes; printed, it is a table.

    Raises:
        ValueError: The model is not adapted.
    """
    container = require_adapted(model).container
    subspace = container.subspace
    described = []
    for name, stack in stacks(model).items():
        trained = sum(p.numel() for p in stack.parameters() if p.requires_grad)
        call = stack.options.along.call_shape(stack.slices, 1, stack.blocks)
        described.append(
            StackSummary(
                name, stack.slices, stack.shape, stack.rank, stack.rank[1] * call.blocks, stack.scale, trained,
                sum(_bytes(t) for t in (stack.core, stack.held_col, stack.row) if t is not None),
            )
        )  # fmt: skip
    slices = {name: layer.num_slices for name, layer in adapted_layers(model)}
    covers = coverage(model, container.config, slices)
    beside = [p for name, p in model.named_parameters() if CONTAINER not in name.split(".")]
    return Summary(
        tuple(described),
        trained_beside=sum(p.numel() for p in beside if p.requires_grad),
        frozen=sum(p.numel() for p in beside if not p.requires_grad),
        adapted=len(covers.adapted_layers),
        coverage=covers.share,
        left_out=tuple(part.name for part in covers.left_out),
        covers=covers,
        factors="" if subspace is None else str(subspace),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
