"""Where the cores of a bank lie: slots in segments, tensors that never move, for all stacks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# A new segment has a GROWTH-th of the slots that there are, which bounds the memory without adapters to 3 %; at first
# SMALLEST slots, of at most SMALLEST_BYTES together: adapters with heads of their own may have many megabytes each.
SMALLEST, GROWTH, SMALLEST_BYTES = 32, 32, 32 << 20

Cores = Mapping[str, Tensor]


@dataclass(eq=False)
class Slot:
    """A place for the cores of one adapter.

    Attributes:
        segment, offset: Where it is.
        users: How many running batches read it.
        retired: Whether its adapter is gone or has other cores: it is free when no batch reads it any more.
    """

    segment: int
    offset: int
    users: int = 0
    retired: bool = False


@dataclass(eq=False)
class Adapter:
    """One adapter.

    Attributes:
        name, handle: What it is called by.
        slot: Where its cores are on the device; None where they are in the pool alone.
        home: Where they are in the pool; None without one.
        parameters: Its cores, and what it has beside them, as parameters, while it trains.
        used: When a batch last used it, a count.
    """

    name: str
    handle: int
    slot: Slot | None = None
    home: Slot | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    used: int = 0


class Store:
    """Segments of slots on one device: of each stack a tensor (slots, S, c, r) per segment.

    The tensors of stacks whose cores are alike lie side by side, (slots, stacks, S, c, r), so that a batch takes the
    cores of all of them in one step. What adapters have beside their cores is kept in the same way, by the parameter's
    name, which has a dot, in the place of the stack's, which has none.

    The caller holds the bank's lock, except for :meth:`views`, :meth:`own`, :meth:`gather` and :meth:`gather_all`:
    slots that a batch uses are not written, and segments are only ever added.

    Args:
        like: A tensor of shape, dtype and device of what each adapter has, by name.
        start: The values of what an adapter does not have, by name; zeros for all other names.
        device: Where the segments are; None: where ``like`` is.
        limit: The largest number of slots; None: any.
    """

    def __init__(
        self, like: Mapping[str, Tensor], start: Mapping[str, Tensor], device: torch.device | None, limit: int | None
    ) -> None:
        self._like, self._start = like, start
        self._device, self._limit = device, limit
        self._smallest = max(1, min(SMALLEST, SMALLEST_BYTES // max(1, sum(t.nbytes for t in like.values()))))
        self._alike: dict[tuple[object, ...], list[str]] = {}
        for name, core in self._like.items():
            self._alike.setdefault((core.shape, core.dtype, core.device, name in start), []).append(name)
        self._segments: list[dict[str, Tensor]] = []
        self._blocks: list[list[Tensor]] = []  # of each segment the tensors of stacks side by side, as in _alike
        self._free: list[Slot] = []
        self.slots = 0

    @property
    def nbytes(self) -> int:
        """The memory of all segments, in bytes."""
        return sum(tensor.nbytes for segment in self._segments for tensor in segment.values())

    def take(self) -> Slot | None:
        """A free slot, of a new segment where there is none; None where the limit is reached."""
        if not self._free and not self._grow():
            return None
        return self._free.pop()

    def _grow(self) -> bool:
        more = max(self._smallest, self.slots // GROWTH)
        if self._limit is not None:
            more = min(more, self._limit - self.slots)
        if more <= 0:
            return False
        blocks: list[Tensor] = []
        segment: dict[str, Tensor] = {}
        for names in self._alike.values():
            core = self._like[names[0]]
            size = more, len(names), *core.shape
            blocks.append(torch.zeros(size, dtype=core.dtype, device=self._device or core.device))
            segment |= dict(zip(names, blocks[-1].unbind(1), strict=True))
        self._blocks.append(blocks)
        self._free += [Slot(len(self._segments), offset) for offset in reversed(range(more))]
        self._segments.append(segment)
        self.slots += more
        return True

    def retire(self, slot: Slot) -> None:
        """Let go of a slot: it is free once no batch uses it."""
        slot.retired = True
        self._free_unused(slot)

    def acquire(self, slots: Sequence[Slot]) -> None:
        """Keep slots from being written until :meth:`release`."""
        for slot in slots:
            slot.users += 1

    def release(self, slots: Sequence[Slot]) -> None:
        """The end of :meth:`acquire`."""
        for slot in slots:
            slot.users -= 1
            self._free_unused(slot)

    def _free_unused(self, slot: Slot) -> None:
        if slot.retired and slot.users == 0:
            slot.retired = False
            self._free.append(slot)

    @torch.no_grad()
    def write(self, slot: Slot, cores: Cores | None) -> None:
        """Copy cores into a slot; None: zeros. Of what is missing beside them, the values at the start."""
        for name, place in self.views(slot).items():
            value = self._start.get(name) if cores is None or name not in cores else cores[name]
            if value is None:
                place.zero_()
            else:
                place.copy_(value)

    def views(self, slot: Slot) -> dict[str, Tensor]:
        """The cores in a slot by stack, (S, c, r) each, and what is beside them, in the segments' memory."""
        return {name: tensor[slot.offset] for name, tensor in self._segments[slot.segment].items()}

    def own(self, name: str, slots: Sequence[Slot]) -> list[Tensor]:
        """A parameter beside the cores in each of some slots, in the segments' memory: a head is large."""
        return [self._segments[slot.segment][name][slot.offset] for slot in slots]

    def places(self, slots: Sequence[Slot]) -> list[tuple[int, Tensor, Tensor]]:
        """Slots by segment: (segment, positions among the slots, offsets in the segment), for :meth:`gather`."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for position, slot in enumerate(slots):
            positions, offsets = found.setdefault(slot.segment, ([], []))
            positions.append(position)
            offsets.append(slot.offset)
        return [(at, torch.tensor(p, device="cpu"), torch.tensor(o, device="cpu")) for at, (p, o) in found.items()]

    @torch.no_grad()
    def gather(self, name: str, number: int, places: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
        """The cores of one stack in some slots: a new tensor (number, S, c, r)."""
        return _taken([self._segments[at][name] for at, _, _ in places], number, places)

    @torch.no_grad()
    def gather_all(self, number: int, places: Sequence[tuple[int, Tensor, Tensor]]) -> dict[str, Tensor]:
        """The cores of every stack in some slots: (number, S, c, r) each, parts of new tensors."""
        cores: dict[str, Tensor] = {}
        for group, names in enumerate(self._alike.values()):
            if names[0] in self._start:
                continue
            together = _taken([self._blocks[at][group] for at, _, _ in places], number, places)
            cores |= dict(zip(names, together.unbind(1), strict=True))
        return cores


def _taken(segments: Sequence[Tensor], number: int, places: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Rows of some segments, as :meth:`Store.places` says: (number, ...)."""
    device = segments[0].device
    if len(places) == 1:
        return segments[0].index_select(0, places[0][2].to(device))
    rows = segments[0].new_empty(number, *segments[0].shape[1:])
    for segment, (_, positions, offsets) in zip(segments, places, strict=True):
        rows.index_copy_(0, positions.to(device), segment.index_select(0, offsets.to(device)))
    return rows
