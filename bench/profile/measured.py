"""What a profiler saw, whatever its name: pieces of work, each in a stage or outside of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OUTSIDE = "outside"
TOTAL = "total"


@dataclass(frozen=True)
class Work:
    """One or more launches of a stage; None where a tool cannot say.

    seconds       that they took
    read, written bytes of the device's memory
    tensor        the share of the active cycles in which the tensor cores worked, 0 to 1
    """

    stage: str
    seconds: float
    launches: int = 1
    read: float | None = None
    written: float | None = None
    tensor: float | None = None


def by_stage(works: Iterable[Work]) -> dict[str, Work]:
    """Stage -> the sum of its work, in order of appearance, what is outside last; then the total under ``TOTAL``."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        groups.setdefault(work.stage, []).append(work)
    groups[OUTSIDE] = groups.pop(OUTSIDE, [])
    groups[TOTAL] = [work for group in groups.values() for work in group]
    return {stage: _sum(stage, group) for stage, group in groups.items()}


def _sum(stage: str, works: Sequence[Work]) -> Work:
    """``tensor`` is the mean, weighed by time."""
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
    """The sum of those that are known; None where none is."""
    found = [value for value in values if value is not None]
    return sum(found) if found else None
