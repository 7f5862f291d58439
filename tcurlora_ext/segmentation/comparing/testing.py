"""Each method against the reference, paired over the subjects of the validation cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tcurlora_ext.segmentation.metrics.comparison import holm, paired
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean

Row = dict[str, Any]
MEASURES = ("dice", "hd95_mm")


def subject_scores(cases: Sequence[Row], training_set: str, method: str, measure: str) -> dict[str, float]:
    """The score of each subject: the mean over labels and seeds of each of its cases, then over these.

    Args:
        cases: Rows of cases.csv.
        training_set: One of them.
        method: One of them.
        measure: "dice" or "hd95_mm".

    Returns:
        By subject; NaN where no case has a value.
    """
    by_case: dict[tuple[str, str], list[float]] = {}
    for row in cases:
        if (row["training_set"], row["method"]) == (training_set, method):
            labels = [value for name, value in row.items() if name.startswith(f"{measure} ")]
            by_case.setdefault((row["subject"], row["case"]), []).append(finite_mean(labels))
    subjects: dict[str, list[float]] = {}
    for (subject, _), seeds in by_case.items():
        subjects.setdefault(subject, []).append(finite_mean(seeds))
    return {subject: finite_mean(values) for subject, values in subjects.items()}


def against_reference(cases: Sequence[Row], reference: str) -> list[Row]:
    """Compare every other method with the reference by Wilcoxon's signed-rank test over subjects.

    Args:
        cases: Rows of cases.csv.
        reference: The method that the others are compared with.

    Returns:
        For each training set, measure and method: training_set, measure, method, reference, and the values of
        :func:`~tcurlora_ext.segmentation.metrics.comparison.paired`, of which "cases" is called subjects; p_holm is
        corrected by Holm's method for all methods of a training set and measure.
    """
    sets, methods = (list(dict.fromkeys(row[name] for row in cases)) for name in ("training_set", "method"))
    rows: list[Row] = []
    for training_set in sets:
        for measure in MEASURES:
            other = subject_scores(cases, training_set, reference, measure)
            pairs: list[Row] = []
            for method in (name for name in methods if name != reference):
                own = subject_scores(cases, training_set, method, measure)
                both = [own[subject] - other.get(subject, math.nan) for subject in own]
                found = paired([value for value in both if not math.isnan(value)])
                pairs.append({
                    "training_set": training_set, "measure": measure, "method": method, "reference": reference,
                    "subjects": found.pop("cases"), **found,
                })  # fmt: skip
            corrected = holm([pair["p"] for pair in pairs])
            rows += [{**pair, "p_holm": p} for pair, p in zip(pairs, corrected, strict=True)]
    return rows
