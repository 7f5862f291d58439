"""The result of a comparison in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tcurlora_ext.segmentation.methods import base_name
from tcurlora_ext.segmentation.report.cells import after_warm_up, number

Row = Mapping[str, Any]


def comparison_sentence(rows: Sequence[Row], tests: Sequence[Row], reference: str) -> str:
    """What the first form of tCUR, or the method with the best Dice, reaches beside the reference, and who is best.

    Args:
        rows: Of one training set and the label "mean", one for each method.
        tests: Of the same training set and of Dice.
        reference: The method of the tests.
    """
    known = {row["method"]: row for row in rows if not math.isnan(float(row["dice_mean"]))}
    if not known:
        return "No validation case has a labelled structure: there is no score."
    best = max(known, key=lambda name: float(known[name]["dice_mean"]))
    others = [name for name in known if name != reference]
    shown = next((name for name in others if base_name(name).startswith("tcur")), best)
    text = f"Trained on {_cases(known[shown])}, {shown} reaches {_dice(known[shown])}"
    test = next((row for row in tests if row["method"] == shown), None)
    if test is not None and not math.isnan(float(test["difference"])):
        text += f", {_difference(test)} than {reference} with {_parameters(known[reference])}"
    if best == shown:
        end = f"; no other of the {len(rows)} methods has more" if len(rows) > 1 else ""
    else:
        end = f"; the best of the {len(rows)} methods is {best} with {_dice(known[best])}"
    return f"{text}{end}."


def _cases(row: Row) -> str:
    count = int(row["training_cases"])
    return f"{count} case{'s' if count != 1 else ''}"


def _parameters(row: Row) -> str:
    return ", ".join(
        filter(None, (f"{int(row['trained_numbers']):,} trained parameters", after_warm_up(row.get("warm_up_steps"))))
    )


def _dice(row: Row) -> str:
    sd = "" if row["dice_sd"] == "" else f" ± {number(row['dice_sd'], 100, 1)} over {row['seeds']} seeds"
    return f"{number(row['dice_mean'], 100, 1)} % Dice{sd} ({_parameters(row)})"


def _difference(test: Row) -> str:
    """In points of Dice, with its interval over subjects and whether these can tell it from none."""
    more = float(test["difference"]) >= 0
    sign = 100 if more else -100
    low, high = sorted(sign * float(test[end]) for end in ("low", "high"))
    within = ", too few for an interval" if math.isnan(low) else f", 95 % interval {low:.1f} to {high:.1f}"
    chance = "; may be chance" if low <= 0 <= high else ""
    subjects = f"{test['subjects']} subject{'s' if int(test['subjects']) != 1 else ''}"
    size = abs(100 * float(test["difference"]))
    return f"{size:.1f} points {'more' if more else 'less'} ({subjects}{within}{chance})"
