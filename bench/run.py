"""Runs cases: every variant is checked, then all are timed in interleaved rounds, then their costs are counted.

An error of one variant becomes a row that says so, and the other variants are measured. Without the frozen network
there is nothing to compare with: where that fails, the case does.
"""

from __future__ import annotations

import gc
import math
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .cases import Case
from .counts import fewest_bytes, flops
from .devices import PACKAGES, Ceilings, ceilings, repeat, timed
from .memory import forward_pass, observe
from .names import FROZEN, LORA, PAPER_LORA
from .networks import Network, build
from .reference import Reference
from .rows import FAILURE
from .variants import Problem, Variant, prepare, variants

LAYER_COLUMNS = ("in", "out", "slices", "stack", "q")
# What a row says of its variant; all but the last are empty where it could not be measured.
MEASURED = (
    "rounds", "p20_ms", "median_ms", "p80_ms", "over_frozen_p20", "over_frozen", "over_frozen_p80", "over_lora_p20",
    "over_lora", "over_lora_p80", "over_peft_r32_p20", "over_peft_r32", "over_peft_r32_p80", "extra_over_lora", "gflop",
    "fewest_mib", "share_of_flops", "share_of_bytes", "share_of_limit", "peak_mib", "saved_mib", "adapter_mib",
    "trained", "launches", "ceiling_gflops", "ceiling_gbs", "host_ms", "error", "extra_peak_mib", FAILURE,
)  # fmt: skip
LONGEST_FAILURE = 200  # characters
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
            or a package of its network is not installed; and with the traceback of every variant that fails.

    Yields:
        The rows of a case, one per variant. Of a variant that failed the column "failure" holds the error in one line,
        and numbers that were not measured by then are empty.
    """
    found: dict[str, Ceilings] = {}
    for case in cases:
        if case.dtype not in found:
            found[case.dtype] = ceilings(getattr(torch, case.dtype), device)
        try:
            yield measure(case, device, rounds, keep, found[case.dtype], log)
        except torch.OutOfMemoryError:
            log(f"{case.id}: skipped, {device} has too little memory for it")
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES:
                raise
            log(f"{case.id}: skipped, the package '{error.name}' is not installed")
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class Failures:
    """The variants of a case that failed: name -> the error in one line. Each is logged with its traceback."""

    case: Case
    log: Callable[[str], None]
    messages: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def caught(self, name: str) -> Iterator[None]:
        """Record an error of this variant instead of raising it."""
        try:
            yield
        except Exception as error:  # whatever it is, the other variants go on
            self.messages[name] = one_line(error)
            self.log(f"{self.case.id}, {name}: failed\n{traceback.format_exc()}")

    def __contains__(self, name: str) -> bool:
        return name in self.messages


def one_line(error: Exception) -> str:
    """An error's type and message in one line of at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_FAILURE else text[: LONGEST_FAILURE - 3] + "..."


def measure(
    case: Case, device: torch.device, rounds: int, keep: Keep, limits: Ceilings, log: Callable[[str], None]
) -> list[Row]:
    """The rows of one case; only the frozen network's where that could not be timed. Arguments as in :func:`run`."""
    network = build(case, device)
    wanted = [v for v in variants(device) if v.fits(case, network) and (v.name in (FROZEN, LORA) or keep(v, case))]
    failures = Failures(case, log)
    problems, errors = checked(wanted, case, network, failures)
    if case.network not in ("layer", "stack"):
        rounds = max(2, rounds // 3)  # a network's step takes long and varies less
    times, host = interleaved(problems, device, rounds, failures)
    rows: list[Row] = []
    for variant in wanted if FROZEN in times else wanted[:1]:
        name = variant.name
        row = case_columns(case) | {"variant": name} | dict.fromkeys(MEASURED, "")
        if name in times:
            row |= {"rounds": rounds} | time_columns(name, times)
            row |= {"host_ms": number(1e3 * statistics.median(host[name])), "error": f"{errors[name]:.0e}"}
            with failures.caught(name):
                row |= cost_columns(problems[name], device, statistics.median(times[name]), limits)
        rows.append(row | {FAILURE: failures.messages.get(name, "")})
    frozen = rows[0]
    for row in rows:
        if frozen[FAILURE]:
            row[FAILURE] = row[FAILURE] or f"{FROZEN} failed"
        elif not row[FAILURE]:
            row["extra_peak_mib"] = number(float(row["peak_mib"]) - float(frozen["peak_mib"]))
    return rows


def checked(
    wanted: Sequence[Variant], case: Case, network: Network, failures: Failures
) -> tuple[dict[str, Problem], dict[str, float]]:
    """The variants that give right results, ready to run, and their largest relative errors; both by name."""
    reference = Reference()
    problems: dict[str, Problem] = {}
    errors: dict[str, float] = {}
    for variant in wanted:
        with failures.caught(variant.name):
            problems[variant.name], errors[variant.name] = _checked(variant, case, network, reference)
        if FROZEN in failures:
            break
        if variant.name in failures:
            gc.collect()  # a half-built network may refer to itself and keep its memory
    return problems, errors


def _checked(variant: Variant, case: Case, network: Network, reference: Reference) -> tuple[Problem, float]:
    problem = prepare(variant, case, network)
    return problem, reference.check(problem)


def interleaved(
    problems: dict[str, Problem], device: torch.device, rounds: int, failures: Failures
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step by variant and round, and the part of them that the host took to queue its work.

    Every problem has run once before, so that nothing is compiled or allocated for the first time here. One that fails
    has no times; where it is the frozen network, no problem has any.
    """
    counts: dict[str, int] = {}
    for name, problem in problems.items():
        with failures.caught(name):
            counts[name] = _steps_per_timing(problem, device)
    times: dict[str, list[float]] = {name: [] for name in counts}
    host: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(rounds):
        for name, count in counts.items():
            if name not in failures and FROZEN not in failures:
                with failures.caught(name):
                    taken, queued = timed(partial(repeat, problems[name].step, count), device)
                    times[name].append(taken / count)
                    host[name].append(queued / count)
    if FROZEN in failures:
        return {}, {}
    kept = [name for name in counts if name not in failures]
    return {name: times[name] for name in kept}, {name: host[name] for name in kept}


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
    lora = times.get(LORA, times[FROZEN])  # without LoRA there is no ratio
    extra = [(t - f) / (w - f) for t, f, w in zip(taken, times[FROZEN], lora, strict=True) if w > f]
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
