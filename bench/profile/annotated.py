"""torch.profiler where there is no Nsight: time and launches of every stage, from the operator's user annotations."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType

from ..devices import wait
from ..memory import innermost
from ..variants import Problem
from .measured import OUTSIDE, TOTAL, Work, by_stage
from .stages import is_stage

STEP = "one step"
STEPS = 15  # each profiled alone; the medians are reported


@dataclass(frozen=True)
class Event:
    """A stretch of time, in microseconds: a named range, or a piece of work."""

    name: str
    start: float
    end: float
    is_range: bool = False

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e6


def profile(problem: Problem, device: torch.device) -> list[Work]:
    """Medians over some steps, one ``Work`` a stage.

    On a CPU the time is the host's, and launches are operators that compute something; on a GPU the time is that of
    kernels, copies and fills, which are the launches.
    """
    steps = [by_stage(_one_step(problem, device)) for _ in range(STEPS)]
    return [
        Work(stage, statistics.median(step[stage].seconds for step in steps), first.launches)
        for stage, first in steps[0].items()
        if stage != TOTAL
    ]


def _one_step(problem: Problem, device: torch.device) -> list[Work]:
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * on_gpu) as profile:
        with torch.profiler.record_function(STEP):
            problem.step()
        wait(device)
    found = profile.events() or []
    there = [event for event in found if (event.device_type == DeviceType.CUDA) == on_gpu]
    ranges = [_event(event, is_range=True) for event in there if event.is_user_annotation]
    if on_gpu:
        return gpu_work([*ranges, *(_event(event) for event in there if not event.is_user_annotation)])
    # A range of the C++ part that calls no operator is work itself.
    return cpu_work([*ranges, *map(_event, innermost(there))])


def _event(found: Any, is_range: bool = False) -> Event:
    return Event(found.name, found.time_range.start, found.time_range.end, is_range)


def cpu_work(events: Sequence[Event]) -> list[Work]:
    """A stage takes as long as its range; outside is what is left of the step."""
    stages, inside = _split(events)
    works = [Work(stage.name, stage.seconds, len(found)) for stage, found in zip(stages, inside, strict=False)]
    step = next(event for event in events if event.is_range and event.name == STEP)
    return [*works, Work(OUTSIDE, step.seconds - sum(work.seconds for work in works), len(inside[-1]))]


def gpu_work(events: Sequence[Event]) -> list[Work]:
    """Kernels by the range that they ran in on the device's timeline, which has one stream."""
    stages, inside = _split(events)
    names = [*(stage.name for stage in stages), OUTSIDE]
    return [Work(name, event.seconds) for name, found in zip(names, inside, strict=True) for event in found]


def _split(events: Sequence[Event]) -> tuple[list[Event], list[list[Event]]]:
    """The stages, which do not nest, in their order; the work of each of them, and last that outside of all."""
    stages = sorted((e for e in events if e.is_range and is_stage(e.name)), key=lambda event: event.start)
    starts = [stage.start for stage in stages]
    inside: list[list[Event]] = [[] for _ in range(len(stages) + 1)]
    for event in events:
        if not event.is_range:
            at = bisect_right(starts, event.start) - 1
            inside[at if at >= 0 and event.end <= stages[at].end else -1].append(event)
    return stages, inside
