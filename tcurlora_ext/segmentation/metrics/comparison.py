"""What scores say: means with bootstrap intervals, and methods compared in pairs over the same cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tcurlora_ext.io.table import shortened, text_table
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean

Row = Mapping[str, Any]
ALL = "mean"  # stands for a label where a value is the mean over labels
LEVEL = 0.95
RESAMPLES = 9999
FEWEST = 5  # cases or subjects for an interval: of fewer, resampling makes it far too narrow
REFERENCE = "lora"  # which other methods are compared with, where it is among them and nothing else is said
SHOWN_PAIRED = 4  # of more methods, tables compare with one alone

# The column of scores.csv; heading, factor and digits in tables. Of volume errors, the absolute value is taken.
MEASURES = {
    "dice": ("Dice %", 100, 1),
    "hd95_mm": ("HD95 mm", 1, 2),
    "surface_dice_1mm": ("surface Dice %", 100, 1),
    "volume_error_percent": ("volume error %", 1, 1),
}


def case_values(rows: Sequence[Row], measure: str) -> dict[tuple[str, str], dict[str, float]]:
    """The value of each case by method and label, and with the label ``ALL`` its mean over labels.

    Args:
        rows: Of scores.csv. Values of several seeds are averaged; NaN is left out of every mean.
        measure: One of `MEASURES`.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        value = abs(row[measure]) if measure.startswith("volume_error") else row[measure]
        found.setdefault((row["method"], row["label"]), {}).setdefault(row["case"], []).append(value)
    values = {key: {case: finite_mean(seeds) for case, seeds in cases.items()} for key, cases in found.items()}
    for method in dict.fromkeys(method for method, _ in found):
        own = [cases for (name, _), cases in values.items() if name == method]
        values[method, ALL] = {case: finite_mean([cases[case] for cases in own]) for case in own[0]}
    return values


def interval(values: Sequence[float], fewest: int = FEWEST) -> tuple[float, float]:
    """The 95 % interval of a mean by SciPy's bootstrap: percentiles of the means of resampled cases.

    Args:
        values: One for each case, all finite. The same values always give the same interval.
        fewest: How many there have to be, two at least.

    Returns:
        NaN for fewer values.
    """
    from scipy.stats import bootstrap

    if len(values) < max(fewest, 2):
        return math.nan, math.nan
    found = bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def summarise_scores(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over cases with their intervals, one entry for each method, label and measure.

    Returns:
        Entries with method, label (``ALL`` for the mean over labels), measure, cases (how many have a value), mean,
        low and high. Volume errors are absolute.
    """
    entries = []
    for measure in MEASURES:
        for (method, label), cases in case_values(rows, measure).items():
            values = [value for value in cases.values() if not math.isnan(value)]
            low, high = interval(values)
            entries.append({
                "method": method, "label": label, "measure": measure, "cases": len(values),
                "mean": finite_mean(values), "low": low, "high": high,
            })  # fmt: skip
    return entries


def compare_methods(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every two methods, paired over the cases for which both have a value, by the mean over labels.

    Returns:
        Entries with measure, method, other, the values of :func:`paired` for method minus other, and p_holm, corrected
        by Holm's method for all pairs of a measure.
    """
    entries = []
    for measure in MEASURES:
        values = {method: cases for (method, label), cases in case_values(rows, measure).items() if label == ALL}
        pairs: list[dict[str, Any]] = []
        for method, other in combinations(values, 2):
            found = [values[method][case] - values[other].get(case, math.nan) for case in values[method]]
            differences = [value for value in found if not math.isnan(value)]
            pairs.append({"measure": measure, "method": method, "other": other, **paired(differences)})
        corrected = holm([pair["p"] for pair in pairs])
        entries += [{**pair, "p_holm": p} for pair, p in zip(pairs, corrected, strict=True)]
    return entries


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """What paired differences say.

    Args:
        differences: One for each case or subject, all finite.

    Returns:
        cases (how many); difference, their mean, with its 95 % bootstrap interval, low and high (NaN for few);
        rank_biserial, from -1 to 1: the share of the rank sum of their sizes that belongs to differences above 0 minus
        that below; and p of Wilcoxon's signed-rank test.
    """
    low, high = interval(differences)
    return {
        "cases": len(differences), "difference": finite_mean(differences), "low": low, "high": high,
        "rank_biserial": rank_biserial(differences), "p": _wilcoxon(differences),
    }  # fmt: skip


def rank_biserial(differences: Sequence[float]) -> float:
    """The matched-pairs rank-biserial correlation (Kerby 2014); differences of 0 are left out, NaN where none is left.

    Args:
        differences: All finite.
    """
    from scipy.stats import rankdata

    values = np.asarray([value for value in differences if value])
    if not len(values):
        return math.nan
    ranks = rankdata(np.abs(values))
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def _wilcoxon(differences: Sequence[float]) -> float:
    """The two-sided p-value; 1 where no case differs, NaN where there is none."""
    from scipy.stats import wilcoxon

    if not differences:
        return math.nan
    if not any(differences):
        return 1.0
    with warnings.catch_warnings():  # SciPy warns of few cases, whose number stands beside the value
        warnings.simplefilter("ignore")
        return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method; NaN stays and does not count."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = list(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _number(value: float, digits: int, factor: float = 1, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{factor * value:{sign}.{digits}f}"


def _interval(row: Row, digits: int, factor: float, sign: str = "") -> str:
    """The interval of a mean; few cases have none."""
    low, high = (_number(row[end], digits, factor, sign) for end in ("low", "high"))
    return "-" if low == high == "-" else f"{low} to {high}"


def tables(summary: Sequence[Row], comparisons: Sequence[Row]) -> list[str]:
    """Means of each label, intervals of the means over labels, and comparisons, as texts of at most 80 columns."""
    by_key = {(row["method"], row["label"], row["measure"]): row for row in summary}
    keys = list(dict.fromkeys((row["method"], row["label"]) for row in summary))
    means = text_table(
        ("method", "label", *(heading for heading, _, _ in MEASURES.values())),
        [
            [
                shortened(method, 12), shortened(label, 16),
                *(_number(by_key[method, label, name]["mean"], digits, factor)
                  for name, (_, factor, digits) in MEASURES.items()),
            ]
            for method, label in keys
        ],
        left=(0, 1),
    )  # fmt: skip
    intervals = text_table(
        ("method", "mean over labels", "mean", "95 % interval", "cases"),
        [
            [
                shortened(row["method"], 16), heading, _number(row["mean"], digits, factor),
                _interval(row, digits, factor), str(row["cases"]),
            ]
            for row in summary
            if row["label"] == ALL
            for heading, factor, digits in [MEASURES[row["measure"]]]
        ],
        left=(0, 1),
    )  # fmt: skip
    if any(0 < row["cases"] < FEWEST for row in summary if row["label"] == ALL):
        intervals += f"\nfewer than {FEWEST} cases are too few for an interval"
    return [means, intervals, *([_comparison_table(comparisons)] if comparisons else [])]


def _comparison_table(comparisons: Sequence[Row]) -> str:
    """Every two methods; of more than four, whose pairs nobody reads, those with lora, or else with the first."""
    names = list(dict.fromkeys(name for row in comparisons for name in (row["method"], row["other"])))
    reference = REFERENCE if REFERENCE in names else names[0]
    few = len(names) <= SHOWN_PAIRED
    shown = [row for row in comparisons if few or reference in (row["method"], row["other"])]
    rows = []
    for row in shown:
        heading, factor, digits = MEASURES[row["measure"]]
        rows.append([
            f"{shortened(row['method'], 10)} - {shortened(row['other'], 10)}", heading,
            _number(row["difference"], digits, factor, "+"), _interval(row, digits, factor, "+"),
            "-" if math.isnan(row["p_holm"]) else f"{row['p_holm']:.2g}", str(row["cases"]),
        ])  # fmt: skip
    table = text_table(("difference", "of", "mean", "95 % interval", "p (Holm)", "cases"), rows, left=(0, 1))
    return table if few else f"{table}\n{len(shown)} of {len(comparisons)} comparisons; all are in scores.json"
