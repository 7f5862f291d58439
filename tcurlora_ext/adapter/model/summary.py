"""What an adapted model trains and holds, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tcurlora_ext.io.table import text_table

from .structure import CONTAINER, require_container, stacks


@dataclass(frozen=True)
class StackSummary:
    """One stack of a :class:`Summary`.

    Attributes:
        name: Of the stack.
        slices: S, how many slices there are.
        shape: (out, in) of a slice.
        rank: (c, r).
        q: Width of h = x row^T: r numbers for each of the core's blocks, r in all without a transform.
        scale: What C * U * R is multiplied by.
        trained: Numbers that train in the stack.
        bytes: What its core and factors take.
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
    """The stacks of a model and its numbers; ``str()`` makes a table of it.

    Attributes:
        stacks: One :class:`StackSummary` a stack.
        trained_beside: Numbers that train beside the stacks (a head, a decoder).
        frozen: Numbers of the model that do not train, C and R not counted.
    """

    stacks: tuple[StackSummary, ...]
    trained_beside: int
    frozen: int

    @property
    def trained(self) -> int:
        """All trained numbers."""
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
            f"trained: {self.trained:,} of {self.trained + self.frozen:,} numbers ({share:.3%}), "
            f"{self.trained - self.trained_beside:,} in cores, {self.trained_beside:,} beside them"
        )


def summary(model: nn.Module) -> Summary:
    """Count what an adapted model trains and holds.

    Args:
        model: An adapted model.

    Returns:
        Stacks, slices, q, trained numbers and bytes; print it for a table.

    Raises:
        ValueError: The model is not adapted.
    """
    require_container(model)
    described = []
    for name, stack in stacks(model).items():
        trained = sum(p.numel() for p in stack.parameters() if p.requires_grad)
        call = stack.options.along.call_shape(stack.slices, 1, stack.blocks)
        described.append(
            StackSummary(
                name, stack.slices, stack.shape, stack.rank, stack.rank[1] * call.blocks, stack.scale, trained,
                sum(map(_bytes, (stack.core, stack.col, stack.row))),
            )
        )  # fmt: skip
    beside = [p for name, p in model.named_parameters() if CONTAINER not in name.split(".")]
    return Summary(
        tuple(described),
        trained_beside=sum(p.numel() for p in beside if p.requires_grad),
        frozen=sum(p.numel() for p in beside if not p.requires_grad),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
