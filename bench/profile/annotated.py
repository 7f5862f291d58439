"""Profiles by torch.profiler, where Nsight does not work: time and launches of every stage, by user annotations."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType

from ..devices import synchronize
from ..memory import innermost
from ..variants import Problem
from .measured import OUTSIDE, TOTAL, Work, by_stage
from .stages import is_stage

STEP = "one step"
STEPS = 15  # each is profiled by itself; the result is the median


@dataclass(frozen=True)
class Event:
    """A named range or a piece of work, such as a kernel, on the timeline.

    Attributes:
        name: Of the range, kernel or operator.
        start: In microseconds.
        end: In microseconds.
        is_range: Whether it is a range.
    """

    name: str
    start: float
    end: float
    is_range: bool = False

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e6


def profile(problem: Problem, device: torch.device) -> list[Work]:
    """Medians over :data:`STEPS` steps, one ``Work`` per stage.

    On a CPU the time is that of the stage on the host, and launches are calls of operators that compute something. On a
    GPU the time is that of kernels, copies and fills, and these are the launches.
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
        synchronize(device)
    found = profile.events() or []
    there = [event for event in found if (event.device_type == DeviceType.CUDA) == on_gpu]
    ranges = [_event(event, is_range=True) for event in there if event.is_user_annotation]
    if on_gpu:
        return gpu_work([*ranges, *(_event(event) for event in there if not event.is_user_annotation)])
    # A stage of the C++ extension may call no operator: then its range counts as a launch.
    return cpu_work([*ranges, *map(_event, innermost(there))])


def _event(found: Any, is_range: bool = False) -> Event:
    return Event(found.name, found.time_range.start, found.time_range.end, is_range)


def cpu_work(events: Sequence[Event]) -> list[Work]:
    """Work on a CPU: a stage takes as long as its range; the rest of the step is outside of all stages."""
    stages, inside = _split(events)
    works = [Work(stage.name, stage.seconds, len(found)) for stage, found in zip(stages, inside, strict=False)]
    step = next(event for event in events if event.is_range and event.name == STEP)
    return [*works, Work(OUTSIDE, step.seconds - sum(work.seconds for work in works), len(inside[-1]))]


def gpu_work(events: Sequence[Event]) -> list[Work]:
    """Work on a GPU: each kernel belongs to the range in which it ran on the device's timeline, a single stream."""
    stages, inside = _split(events)
    names = [*(stage.name for stage in stages), OUTSIDE]
    return [Work(name, event.seconds) for name, found in zip(names, inside, strict=True) for event in found]


def _split(events: Sequence[Event]) -> tuple[list[Event], list[list[Event]]]:
    """The stages in order, which do not nest; the work of each stage, and in a last list the work outside of all."""
    stages = sorted((e for e in events if e.is_range and is_stage(e.name)), key=lambda event: event.start)
    starts = [stage.start for stage in stages]
    inside: list[list[Event]] = [[] for _ in range(len(stages) + 1)]
    for event in events:
        if not event.is_range:
            at = bisect_right(starts, event.start) - 1
            inside[at if at >= 0 and event.end <= stages[at].end else -1].append(event)
    return stages, inside
