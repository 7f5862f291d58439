"""Runs cases: every variant is checked, then all are timed in interleaved rounds, then their costs are counted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .cases import Case
from .counts import fewest_bytes, flops
from .devices import PACKAGES, Ceilings, ceilings, repeat, timed
from .memory import forward_pass, observe
from .names import FROZEN, LORA, PAPER_LORA
from .networks import build
from .reference import Reference
from .variants import Problem, Variant, prepare, variants

LAYER_COLUMNS = ("in", "out", "slices", "stack", "q")
# On a GPU so many steps are timed together that they take this long: the host then queues work ahead of the device, as
# it does in training.
BATCH_SECONDS = 0.02

Row = dict[str, Any]
Keep = Callable[[Variant, Case], bool]


def run(
    cases: Sequence[Case], device: torch.device, rounds: int, keep: Keep, log: Callable[[str], None]
) -> Iterator[list[Row]]:
    """Measure cases one after the other.

    Args:
        cases: What is measured.
        device: Where.
        rounds: How often each variant is timed, at least 2.
        keep: Whether a variant of a case is measured. The frozen network and LoRA of rank q always are, for the ratios.
        log: Called with a line of text for every case that is skipped, because the device has too little memory for it
            or a package of its network is not installed.

    Yields:
        The rows of a case, one per variant.
    """
    found: dict[str, Ceilings] = {}
    for case in cases:
        if case.dtype not in found:
            found[case.dtype] = ceilings(getattr(torch, case.dtype), device)
        try:
            yield measure(case, device, rounds, keep, found[case.dtype])
        except torch.OutOfMemoryError:
            log(f"{case.id}: skipped, {device} has too little memory for it")
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES:
                raise
            log(f"{case.id}: skipped, the package '{error.name}' is not installed")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(case: Case, device: torch.device, rounds: int, keep: Keep, limits: Ceilings) -> list[Row]:
    """The rows of one case. RuntimeError where a variant's result is wrong; then nothing of the case is timed."""
    network = build(case, device)
    reference = Reference()
    problems: list[Problem] = []
    errors: list[float] = []
    for variant in variants(device):
        if variant.fits(case, network) and (variant.name in (FROZEN, LORA) or keep(variant, case)):
            problems.append(prepare(variant, case, network))
            errors.append(reference.check(problems[-1]))
    del reference
    if case.network not in ("layer", "stack"):
        rounds = max(2, rounds // 3)  # a network's step takes long and varies less
    times, host = interleaved(problems, device, rounds)
    rows = [
        case_columns(case) | {"variant": problem.variant.name, "rounds": rounds}
        | time_columns(name, times) | cost_columns(problem, device, statistics.median(times[name]), limits)
        | {"host_ms": number(1e3 * statistics.median(host[name])), "error": f"{error:.0e}"}
        for (name, problem), error in zip(named(problems), errors, strict=True)
    ]  # fmt: skip
    frozen = rows[0]
    for row in rows:
        row["extra_peak_mib"] = number(float(row["peak_mib"]) - float(frozen["peak_mib"]))
    return rows


def named(problems: Sequence[Problem]) -> list[tuple[str, Problem]]:
    return [(problem.variant.name, problem) for problem in problems]


def interleaved(
    problems: Sequence[Problem], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step by variant and round, and the part of them that the host took to queue its work.

    Every problem has run once before, so that nothing is compiled or allocated for the first time here.
    """
    counts = {name: _steps_per_timing(problem, device) for name, problem in named(problems)}
    times: dict[str, list[float]] = {name: [] for name, _ in named(problems)}
    host: dict[str, list[float]] = {name: [] for name, _ in named(problems)}
    for _ in range(rounds):
        for name, problem in named(problems):
            taken, queued = timed(partial(repeat, problem.step, counts[name]), device)
            times[name].append(taken / counts[name])
            host[name].append(queued / counts[name])
    return times, host


def _steps_per_timing(problem: Problem, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    problem.step()
    return math.ceil(BATCH_SECONDS / timed(problem.step, device)[0])


def case_columns(case: Case) -> Row:
    """The columns that say what was measured; a layer's sizes are empty for a network."""
    layer = case.layer
    shape = [""] * 5 if layer is None else [
        layer.in_features, layer.out_features, layer.slices, layer.stack, case.rank * layer.stack
    ]  # fmt: skip
    return {
        "case": case.name, "network": case.network, "sweep": case.sweep, "mode": case.mode, "dtype": case.dtype,
        "tokens": case.tokens, "rank": case.rank, **dict(zip(LAYER_COLUMNS, shape, strict=True)),
    }  # fmt: skip


def time_columns(name: str, times: dict[str, list[float]]) -> Row:
    """Median and percentiles of the time, and of its ratios to other variants' times in the same round."""
    taken = times[name]
    row: Row = dict(zip(("p20_ms", "median_ms", "p80_ms"), map(number, middle([1e3 * t for t in taken])), strict=True))
    for key, other in (("over_frozen", FROZEN), ("over_lora", LORA), ("over_peft_r32", PAPER_LORA)):
        ratios = [t / o for t, o in zip(taken, times[other], strict=True)] if other in times else []
        found = map(number, middle(ratios)) if ratios else ("", "", "")
        row |= dict(zip((f"{key}_p20", key, f"{key}_p80"), found, strict=True))
    extra = [(t - f) / (w - f) for t, f, w in zip(taken, times[FROZEN], times[LORA], strict=True) if w > f]
    return row | {"extra_over_lora": number(statistics.median(extra)) if extra and name != FROZEN else ""}


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def cost_columns(problem: Problem, device: torch.device, seconds: float, limits: Ceilings) -> Row:
    """FLOPs and bytes by count and as shares of the device's ceilings, memory, trained parameters and launches."""
    passed = forward_pass(problem)
    work, moved = flops(problem), fewest_bytes(problem, passed)
    observed = observe(problem.step, device)
    compiled = problem.variant.compiled  # the saved tensors of a compiled function cannot be seen
    adapter = sum(p.nbytes for p in problem.adapted.parameters()) + sum(b.nbytes for b in problem.adapted.buffers())
    adapter -= sum(p.nbytes for p in problem.network.module.parameters())
    adapter -= sum(b.nbytes for b in problem.network.module.buffers())
    return {
        "gflop": number(work / 1e9), "fewest_mib": number(moved / 2**20),
        "share_of_flops": number(work / limits.flops / seconds),
        "share_of_bytes": number(moved / limits.bytes / seconds),
        "share_of_limit": number(limits.limit(work, moved) / seconds),
        "peak_mib": number(observed.peak / 2**20),
        "saved_mib": "" if compiled else number(sum(passed.saved.values()) / 2**20),
        "adapter_mib": number(adapter / 2**20),
        "trained": sum(p.numel() for p in problem.trained),
        "launches": observed.launches,
        "ceiling_gflops": number(limits.flops / 1e9), "ceiling_gbs": number(limits.bytes / 1e9),
    }  # fmt: skip


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
