"""The tables of a comparison, from the results in its run folders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.comparing.settings import Part, Plan
from tcurlora_ext.segmentation.dataset.subjects import by_subject
from tcurlora_ext.segmentation.metrics.comparison import ALL as MEAN
from tcurlora_ext.segmentation.runs.adapting import COST, read_result

Row = dict[str, Any]


def collect_results(plan: Plan, parts: Sequence[Part]) -> list[Row]:
    """One row for each training set, method and seed: the content of its result.json after the set's name."""
    return [
        {"training_set": part.name, **read_result(part.out / method.folder / f"seed{seed}")}
        for part in parts
        for method in plan.methods
        for seed in range(plan.settings.seeds)
    ]


def collect_cases(plan: Plan, parts: Sequence[Part]) -> list[Row]:
    """One row for each training set, method, seed and validation case, with its subject and scores; NaN: none."""
    rows = []
    for part in parts:
        for method in plan.methods:
            for seed in range(plan.settings.seeds):
                cases = read_csv(part.out / method.folder / f"seed{seed}" / "cases.csv")
                subjects = subjects_of([case["case"] for case in cases], plan)
                rows += [
                    {"training_set": part.name, "method": method.name, "seed": seed, "case": case.pop("case"),
                     "subject": subject, **{name: float(value or math.nan) for name, value in case.items()}}
                    for case, subject in zip(cases, subjects, strict=True)
                ]  # fmt: skip
    return rows


def subjects_of(names: Sequence[str], plan: Plan) -> list[str]:
    """The subject of each case: of the file of subjects, or the name of the subject's first case.

    Raises:
        ValueError: The file of subjects leaves a case out.
    """
    path = plan.settings.subject_file
    if path is not None:
        missing = [name for name in names if name not in plan.subjects]
        if missing:
            raise ValueError(f"{path}: found no subject of the case {missing[0]}, expected one of every case")
        return [plan.subjects[name] for name in names]
    found = list(names)
    for group in by_subject(names, plan.settings.subject_pattern):
        for index in group:
            found[index] = names[group[0]]
    return found


def table(results: Sequence[Row], parts: Sequence[Part], measured: Mapping[str, Row]) -> list[Row]:
    """One row for each training set, method and label, with the label "mean" for the mean over labels.

    Args:
        results: Of :func:`collect_results`.
        parts: The runs.
        measured: Time and memory of steps by method, where they were measured side by side; they stand for those of
            the training.

    Returns:
        training_set, subjects (how many were trained on), method, label, seeds; mean and standard deviation over
        seeds (of n - 1; empty for one) of Dice, 0 to 1, and HD95 in mm; how many of all labels of all cases and seeds
        have no HD95 and are left out of its mean, because nothing was predicted; what the method trains and costs.
    """
    import pandas as pd

    labels = [name.removeprefix("dice ") for name in results[0] if name.startswith("dice ")]
    trained_on = {part.name: read_json(part.out / "run.json")["data"]["train"] for part in parts}
    rows = []
    for (name, method), frame in pd.DataFrame(results).groupby(["training_set", "method"], sort=False):
        for label in (MEAN, *labels):
            dice, hd95 = ("dice", "hd95_mm") if label == MEAN else (f"dice {label}", f"hd95_mm {label}")
            rows.append({
                "training_set": name, "training_cases": len(trained_on[name]), "method": method, "label": label,
                "seeds": len(frame), **_spread(frame[dice], "dice"), **_spread(frame[hd95], "hd95_mm"),
                "hd95_undefined": int(frame["hd95_undefined"].sum()) if label == MEAN else "",
                "trained_numbers": int(frame["trained_numbers"].iloc[0]),
                "adapter_bytes": round(frame["adapter_bytes"].mean()),
                **_costs(frame, measured.get(str(method), {})),
                "warm_up_steps": _mean_number(frame, "warm_up_steps"), "steps": _mean_number(frame, "steps"),
                "lr": float(frame["lr"].iloc[0]),
            })  # fmt: skip
    return rows


def _mean_number(frame: Any, name: str) -> int:
    """The mean of a whole number over seeds: early stopping may end them after other steps."""
    return round(frame[name].mean()) if name in frame else 0


def _spread(values: Any, name: str) -> Row:
    return {f"{name}_mean": float(values.mean()), f"{name}_sd": float(values.std()) if len(values) > 1 else ""}


def _costs(frame: Any, measured: Mapping[str, Any]) -> Row:
    """Time and memory of a step: measured side by side, else the mean over the seeds, else empty."""
    found: Row = {}
    for name in COST:
        values = frame[name].dropna()
        own = round(float(values.mean()), 3) if len(values) else ""
        found[name] = measured.get(name, own)
    return found
