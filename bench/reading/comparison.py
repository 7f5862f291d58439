"""The table of a comparison of many methods: Dice, its difference to LoRA over subjects, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence

from ..rows import Row
from .methods import title

COLUMNS = (
    "training_set", "method", "seeds", "dice_mean", "dice_sd", "hd95_mm_mean", "trained_numbers", "adapter_bytes",
    "warm_up_steps", "step_ms", "step_mib", "difference", "low", "high", "p_holm",
)  # fmt: skip


def comparison_table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per method, the highest Dice first; Dice in per cent and differences in points of it.

    Behind ± is the standard deviation over seeds; the interval is over subjects. A dash stands for what was not
    measured.

    Args:
        rows: Of the summary.csv of bench/comparison.py, for one training set.
    """
    header = [
        "form", "trained parameters beside the head", "file, KB", "warm-up, steps", "step, ms", "memory of a step, MiB",
        "seeds", "Dice %", "HD95 mm", "minus LoRA r=8 (95 % interval)", "p",
    ]  # fmt: skip
    head = next((int(row["trained_numbers"]) for row in rows if row["method"] == "head"), 0)
    ordered = sorted(rows, key=lambda row: -float(row["dice_mean"]))
    return [header, *(_line(row, head) for row in ordered)]


def _line(row: Row, head: int) -> list[str]:
    spread = f" ± {100 * float(row['dice_sd']):.1f}" if row["dice_sd"] else ""
    difference = ""
    if row["difference"]:
        low, high = (100 * float(row[name]) for name in ("low", "high"))
        difference = f"{100 * float(row['difference']):+.1f} ({low:+.1f} to {high:+.1f})"
    return [
        title(row["method"]), f"{int(row['trained_numbers']) - head:,}", f"{float(row['adapter_bytes']) / 1e3:,.1f}",
        row["warm_up_steps"] if int(row["warm_up_steps"]) else "", _number(row["step_ms"], 0),
        _number(row["step_mib"], 1), row["seeds"], f"{100 * float(row['dice_mean']):.1f}{spread}",
        _number(row["hd95_mm_mean"], 2), difference, _p(row["p_holm"]),
    ]  # fmt: skip


def _number(text: str, digits: int) -> str:
    return f"{float(text):.{digits}f}" if text else "-"


def _p(text: str) -> str:
    if not text:
        return ""
    return "< 0.001" if float(text) < 0.001 else f"{float(text):.3f}"
