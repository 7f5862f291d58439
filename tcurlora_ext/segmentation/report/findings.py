"""The result of a run in one sentence, with its uncertainty over the scans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.methods import base_name, folder_name
from tcurlora_ext.segmentation.metrics.comparison import interval
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean
from tcurlora_ext.segmentation.report.cells import after_warm_up

RIVALS = ("head", "lora")  # what the adapter is set against, where the run has them


def result_sentence(out: Path, methods: Sequence[str], warm_ups: Mapping[str, int] | None = None) -> str:
    """What the adapted network reaches on the validation scans, and how that compares with other methods of the run.

    It is about the first form of tCUR, or the first method. Intervals are 95 % bootstrap intervals over the scans, of
    means over seeds and classes; those of differences are paired.

    Args:
        out: The run folder.
        methods: The methods of the run.
        warm_ups: How many steps a method takes before those of the run, of those that take some.
    """
    shown = next((name for name in methods if base_name(name).startswith("tcur")), methods[0])
    own = case_dice(out, shown)
    dice = [value for value in own.values() if not math.isnan(value)]
    scans = f"{len(own)} scan{'s' if len(own) != 1 else ''} that it was not trained on"

    def after(name: str) -> str:
        text = after_warm_up((warm_ups or {}).get(name))
        return f" ({text})" if text else ""

    if not dice:
        return f"On {scans}, no structure is labelled: there is no score."
    within = _within(interval(dice), ", 95 % interval ") or _few(len(dice))
    mean = f"{100 * finite_mean(dice):.1f} % (Dice overlap{within})"
    text = f"On {scans}, the network adapted by {shown}{after(shown)} agrees with the reference labels to {mean}"
    rivals = [name for name in RIVALS if name in methods and name != shown] or [m for m in methods if m != shown][:1]
    parts = [part for rival in rivals if (part := _against(own, case_dice(out, rival), rival + after(rival)))]
    return ": ".join([text, " and ".join(parts)] if parts else [text]) + "."


def case_dice(out: Path, method: str) -> dict[str, float]:
    """The Dice of each validation case, 0 to 1: the mean over seeds and classes.

    Args:
        out: The run folder.
        method: Of the run.
    """
    found: dict[str, list[float]] = {}
    for path in sorted((out / folder_name(method)).glob("seed*/cases.csv")):
        for row in read_csv(path):
            classes = [float(value or math.nan) for name, value in row.items() if name.startswith("dice ")]
            found.setdefault(row["case"], []).append(finite_mean(classes))
    return {case: finite_mean(values) for case, values in found.items()}


def _against(own: dict[str, float], other: dict[str, float], name: str) -> str:
    """The difference to another method in points of Dice, and whether these scans can tell it from none."""
    pairs = [own[case] - other.get(case, math.nan) for case in own]
    differences = [value for value in pairs if not math.isnan(value)]
    if not differences:
        return ""
    more = finite_mean(differences) >= 0
    sizes = differences if more else [-value for value in differences]
    low, high = within = interval(sizes)
    chance = "; may be chance" if low <= 0 <= high else ""
    points = f"{100 * finite_mean(sizes):.1f} points {'more' if more else 'less'} than {name}"
    return f"{points}{_within(within, ' (', f'{chance})')}"


def _few(count: int) -> str:
    return f"; {count} scan{'s are' if count != 1 else ' is'} too few for an interval"


def _within(ends: tuple[float, float], before: str, after: str = "") -> str:
    low, high = ends
    return "" if math.isnan(low) else f"{before}{100 * low:.1f} to {100 * high:.1f}{after}"
