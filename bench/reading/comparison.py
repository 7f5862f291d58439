"""The table of a comparison of many methods: Dice, its difference to LoRA over subjects, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence

from tcurlora_ext.segmentation.report.cells import corrected_p, number, with_interval, with_sd

from ..rows import Row
from .methods import title

COLUMNS = (
    "training_set", "method", "seeds", "dice_mean", "dice_sd", "hd95_mm_mean", "trained_numbers", "adapter_bytes",
    "warm_up_steps", "step_ms", "step_mib", "difference", "low", "high", "p_holm",
)  # fmt: skip


def comparison_table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per method, the highest Dice first, by training set; Dice in per cent and differences in points of it.

    Behind ± is the standard deviation over seeds; the interval is over subjects. A dash stands for what was not
    measured.

    Args:
        rows: Of the summary.csv of bench/comparison.py. Of several training sets the number of cases comes first.
    """
    header = [
        "form", "trained parameters beside the head", "file, KB", "warm-up, steps", "step, ms", "memory of a step, MiB",
        "seeds", "Dice %", "HD95 mm", "minus LoRA r=8 (95 % interval)", "p",
    ]  # fmt: skip
    head = next((int(row["trained_numbers"]) for row in rows if row["method"] == "head"), 0)
    ordered = sorted(rows, key=lambda row: -float(row["dice_mean"]))
    if len({row["training_set"] for row in rows}) == 1:
        return [header, *(_line(row, head) for row in ordered)]
    ordered.sort(key=lambda row: int(row["training_cases"]))
    return [["training cases", *header], *([row["training_cases"], *_line(row, head)] for row in ordered)]


def _line(row: Row, head: int) -> list[str]:
    test = row if row["difference"] else None
    return [
        title(row["method"]), f"{int(row['trained_numbers']) - head:,}", number(row["adapter_bytes"], 1e-3, 1),
        row["warm_up_steps"] if int(row["warm_up_steps"]) else "", number(row["step_ms"], 1, 0),
        number(row["step_mib"], 1, 1), row["seeds"], with_sd(row["dice_mean"], row["dice_sd"], 100),
        number(row["hd95_mm_mean"]), with_interval(test), corrected_p(test),
    ]  # fmt: skip
