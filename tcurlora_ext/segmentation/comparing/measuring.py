"""Time and memory of a step of every method, measured side by side: steps.csv.

On a machine whose speed changes, steps that were timed while each method trained cannot be compared. Here the methods
take turns: in each round each of them, read back from its file, takes some steps on the same windows.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from tcurlora_ext.io.records import read_csv, write_csv
from tcurlora_ext.segmentation import training
from tcurlora_ext.segmentation.comparing.settings import Plan
from tcurlora_ext.segmentation.methods import Method
from tcurlora_ext.segmentation.networks import get_spec
from tcurlora_ext.segmentation.runs.adapting import COST, Job, plan_of
from tcurlora_ext.segmentation.runs.network import load_adapted

ROUNDS, TIMED, UNTIMED = 4, 5, 2

Row = dict[str, Any]


def read_steps(plan: Plan) -> dict[str, Row]:
    """What steps.csv says of the methods compared, by method; empty unless it has all of them."""
    path = plan.out / "steps.csv"
    rows = {row["method"]: row for row in read_csv(path)} if path.is_file() else {}
    if not all(method.name in rows for method in plan.methods):
        return {}
    return {
        method.name: {name: float(value) if (value := rows[method.name][name]) else "" for name in COST}
        for method in plan.methods
    }


def measure_steps(plan: Plan, job: Job) -> dict[str, Row]:
    """Measure all methods and write steps.csv; returns the values of :func:`read_steps`.

    Args:
        plan: Of the comparison.
        job: A finished run of all methods; its adapters of seed 0 are read.
    """
    methods = list(plan.methods)
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    memory: dict[str, Row] = {}
    for turn in range(ROUNDS):
        job.display.say(f"measuring steps of {len(methods)} methods, round {turn + 1} of {ROUNDS}")
        for method in methods:
            model, own = load_adapted(job.out, method.name).to(job.device), _plan(job, method)
            if method.name not in memory:
                found_memory = training.step_memory(model, job.train, own)
                memory[method.name] = {
                    "step_mib": round(found_memory.counted_mib, 3), "gpu_peak_mib": found_memory.peak_mib,
                }  # fmt: skip
            seconds[method.name] += training.step_times(model, job.train, own, TIMED, UNTIMED)
    write_csv(plan.out / "steps.csv", [
        {
            "method": name, "step_ms": round(1e3 * statistics.median(times), 3), **memory[name],
            "fastest_ms": round(1e3 * min(times), 3), "slowest_ms": round(1e3 * max(times), 3), "steps": len(times),
            "rounds": ROUNDS, "threads": torch.get_num_threads(), "device": job.device.type,
        }
        for name, times in seconds.items()
    ])  # fmt: skip
    return read_steps(plan)


def _plan(job: Job, method: Method) -> training.Plan:
    options = job.settings.options(get_spec(job.config.network).also_train, 0, method)
    return plan_of(job, method, job.settings.lr[method.name], options)
