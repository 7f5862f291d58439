"""What a profiler measured, the same for all of them: work, by stages and outside of all stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "outside"
TOTAL = "total"


@dataclass(frozen=True)
class Work:
    """One or more launches of a stage. What a tool does not measure is None.

    Attributes:
        stage: Its name, or :data:`OUTSIDE`.
        seconds: The time that the launches took together.
        launches: How many they are.
        read: Bytes read from the device's memory.
        written: Bytes written to it.
        tensor: The share of active cycles in which the tensor cores were busy, 0 to 1.
    """

    stage: str
    seconds: float
    launches: int = 1
    read: float | None = None
    written: float | None = None
    tensor: float | None = None


def by_stage(works: Iterable[Work]) -> dict[str, Work]:
    """Stage -> the sum of its work, in order of appearance; then :data:`OUTSIDE`, then :data:`TOTAL`."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        groups.setdefault(work.stage, []).append(work)
    groups[OUTSIDE] = groups.pop(OUTSIDE, [])
    groups[TOTAL] = [work for group in groups.values() for work in group]
    return {stage: _sum(stage, group) for stage, group in groups.items()}


def _sum(stage: str, works: Sequence[Work]) -> Work:
    """The sum of some work; ``tensor`` is the mean, weighted by time."""
    seconds = sum(work.seconds for work in works)
    busy = [(work.tensor, work.seconds) for work in works if work.tensor is not None]
    weight = sum(time for _, time in busy)
    return Work(
        stage,
        seconds,
        sum(work.launches for work in works),
        _known(work.read for work in works),
        _known(work.written for work in works),
        sum(share * time for share, time in busy) / weight if weight else None,
    )


def _known(values: Iterable[float | None]) -> float | None:
    """The sum of the values that are not None; None where there is none."""
    found = [value for value in values if value is not None]
    return sum(found) if found else None
