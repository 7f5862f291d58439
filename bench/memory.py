"""What a step saves and allocates: bytes saved for the backward pass, and the peak beyond what was allocated before."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType

from tcurlora_ext.saved import saved_for_backward

from .variants import Problem

# Without it the profiler reports every start and stop on stderr. It is read when the profiler is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class Passed:
    """What a forward pass saved and returned.

    Attributes:
        saved: Storages that autograd saves for the backward pass, parameters and buffers aside: address -> bytes. One
            that several layers save counts once, in full.
        outputs: Bytes of the outputs.
    """

    saved: dict[int, int]
    outputs: int


def forward_pass(problem: Problem) -> Passed:
    """Run the first input forward and record what autograd saves: nothing in inference."""
    with saved_for_backward(problem.adapted) as saved:
        outputs = problem.outputs(problem.network.runs[0].inputs)
    return Passed(saved, sum(y.nbytes for y in outputs))


# Operators that return a view or an empty tensor. Where one has to copy, the operator that it calls for that counts.
_FREE = re.compile(
    r"(aten::)?(as_strided|view|t|transpose|permute|select|slice|narrow|expand|unsqueeze|squeeze|flatten|unflatten|reshape"
    r"|_reshape_alias|_unsafe_view|detach|unbind|split|chunk|alias|movedim|numpy_T|empty.*|new_empty.*|resolve_.*|to"
    r"|lift_fresh|item|_local_scalar_dense|set_|resize_)_?|autograd::.*|torch::autograd::.*|.*Backward\d*"
)


@dataclass(frozen=True)
class Observed:
    """What the profiler saw of a step.

    Attributes:
        peak: The most bytes that were allocated at once beyond those allocated before the step.
        launches: On a GPU, kernels, copies and fills. On a CPU, calls of operators that compute something, counted
            innermost first: an operator that calls such operators does not count itself. The native backend calls
            matrix products below PyTorch's dispatcher, so for it the stages of the operator count.
    """

    peak: int
    launches: int


def observe(step: Callable[[], Any], device: torch.device) -> Observed:
    """Run a step under the profiler.

    On a CPU the peak is that of PyTorch's allocator: memory that libraries allocate themselves is not in it.
    """
    gc.collect()
    return _on_gpu(step, device) if device.type == "cuda" else _on_cpu(step)


def _on_gpu(step: Callable[[], Any], device: torch.device) -> Observed:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    on_gpu = [e for e in profile.events() or [] if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return Observed(peak, len(on_gpu))


def _on_cpu(step: Callable[[], Any]) -> Observed:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    held = peak = 0
    records = [event for event in results.events() if event.name() == "[memory]"]
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    return Observed(peak, sum(1 for _ in innermost(profile.events() or [])))


def innermost(events: Iterable[Any]) -> Iterator[Any]:
    """The events of a CPU profile that compute something and contain no other event that does."""
    for event in events:
        if event.cpu_parent is None:
            yield from _innermost(event)


def _innermost(event: Any) -> list[Any]:
    inside = [found for child in event.cpu_children for found in _innermost(child)]
    return inside or [event] * (_FREE.fullmatch(event.name) is None and event.name != "[memory]")
