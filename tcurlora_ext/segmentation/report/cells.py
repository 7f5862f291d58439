"""Cells of the tables of results, for the terminal and for pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tcurlora_ext.io.table import folded, rich_table

if TYPE_CHECKING:
    from rich.table import Table

DASH = "-"


def number(value: Any, factor: float = 1, digits: int = 2, sign: str = "") -> str:
    """A number for reading; a dash where it is empty, None or NaN."""
    if value in ("", None) or math.isnan(float(value)):
        return DASH
    return f"{factor * float(value):{sign},.{digits}f}"


def with_sd(mean: Any, sd: Any, factor: float = 1, digits: int = 1) -> str:
    """A mean with its standard deviation, where there is one."""
    shown = number(sd, factor, digits)
    return number(mean, factor, digits) + ("" if shown == DASH else f" ± {shown}")


def hd95(row: Mapping[str, Any], shown: str) -> str:
    """HD95 as shown, with a mark where its mean leaves values out: where nothing is predicted, there is no distance."""
    return f"{shown}*" if _undefined(row) else shown


def _undefined(row: Mapping[str, Any]) -> int:
    return int(row.get("hd95_undefined") or 0)


def with_interval(row: Mapping[str, Any] | None, factor: float = 100, digits: int = 1) -> str:
    """A "difference" with its interval from "low" to "high", where there is one; nothing without a row."""
    if row is None:
        return ""
    low, high = (number(row[end], factor, digits, "+") for end in ("low", "high"))
    return number(row["difference"], factor, digits, "+") + ("" if low == DASH else f" ({low} to {high})")


def corrected_p(row: Mapping[str, Any] | None) -> str:
    """The "p_holm" of a test; nothing without a row."""
    if row is None:
        return ""
    shown = number(row["p_holm"], 1, 3)
    return "< 0.001" if shown != DASH and float(row["p_holm"]) < 0.001 else shown


def after_warm_up(steps: Any) -> str:
    """The warm-up of a method in words; nothing where it has none."""
    count = int(steps or 0)
    return f"after a warm-up of {count:,} step{'s' if count != 1 else ''}" if count else ""


def table_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below a table of methods: what the mark of :func:`hd95` stands for, and which take more steps."""
    found = ", ".join(f"{row['method']} {_undefined(row):,}" for row in rows if _undefined(row))
    marked = f"* the mean leaves out labels of which nothing was predicted: {found} (of all cases and seeds)"
    warm_ups = ((row, after_warm_up(row.get("warm_up_steps"))) for row in rows)
    longer = [f"{row['method']}: {int(row['steps']):,} steps {text}" for row, text in warm_ups if text]
    return [marked, *longer] if found else longer


def in_lines(name: str, width: int) -> str:
    """A name in lines of at most so many characters."""
    return "\n".join(folded(name, width))


def results_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str, gap: int = 1, notes: Sequence[str] = ()
) -> Table:  # fmt: skip
    """A table for a terminal of 80 columns; cells may have several lines, and the first column is aligned left.

    Args:
        header: The columns' headings.
        rows: The cells.
        title: Above the table.
        gap: Spaces between columns, beside one that there always is.
        notes: Lines below it.
    """
    from rich.box import SIMPLE_HEAD
    from rich.text import Text

    look: dict[str, Any] = {"title": title, "box": SIMPLE_HEAD, "padding": (0, gap, 0, 0)}
    if notes:
        look |= {"caption": Text("\n".join(notes)), "caption_justify": "left", "caption_style": ""}
    return rich_table(header, rows, **look)
