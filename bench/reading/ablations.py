"""The table of ablations: what differs from a base setting, and by how much Dice does then."""

from __future__ import annotations

from collections.abc import Sequence

from ..rows import Row

COLUMNS = (
    "group", "varied", "method", "seeds", "trained_beside_head", "dice_mean", "dice_sd", "base", "difference",
    "difference_sd", "low", "high",
)  # fmt: skip


def ablations_table(rows: Sequence[Row]) -> list[list[str]]:
    """One line per setting; Dice in per cent and differences in points of it.

    Behind ± is the standard deviation over seeds, that of differences taken seed by seed. The interval is the 95 %
    bootstrap interval over cases of the same difference.

    Args:
        rows: Of summary.csv by bench/ablations.py.
    """
    header = [
        "differs in", "setting", "trained parameters beside the head", "seeds", "Dice %", "minus base",
        "95 % interval over cases",
    ]  # fmt: skip
    return [header, *map(_line, rows)]


def _line(row: Row) -> list[str]:
    return [
        row["varied"], _setting(row["method"]), f"{int(row['trained_beside_head']):,}", row["seeds"],
        _points(row["dice_mean"]) + _spread(row["dice_sd"], 1),
        _points(row["difference"], "+.2f") + _spread(row["difference_sd"], 2),
        f"{_points(row['low'], '+.2f')} to {_points(row['high'], '+.2f')}" if row["low"] else "",
    ]  # fmt: skip


def _setting(method: str) -> str:
    """What a method is called beside what it differs in: its options, or its name where it has none."""
    name, _, options = method.partition(":")
    return f"`{options.replace(':', ', ') or name}`"


def _points(text: str, form: str = ".1f") -> str:
    return format(100 * float(text), form) if text else ""


def _spread(text: str, digits: int) -> str:
    return f" ± {100 * float(text):.{digits}f}" if text else ""
