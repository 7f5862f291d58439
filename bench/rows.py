"""Result files as rows of text: reading and checking them, the key of a row, its numbers and titles."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from tcurlora_ext.io.records import read_csv

from .devices import PACKAGES
from .names import operator_variants

Row = dict[str, str]
PROVENANCE = ("device", *PACKAGES, "commit")
# The columns that identify a row; a layer's width and its stack's slices differ between the points of a sweep.
KEY = ("case", "sweep", "mode", "dtype", "tokens", "rank", "in", "out", "slices", "stack", "variant")
# The columns that readers of a result file need. A cell may be empty.
NUMBERS = (
    "tokens", "rank", "rounds", "p20_ms", "median_ms", "p80_ms", "over_frozen_p20", "over_frozen", "over_frozen_p80",
    "over_lora", "over_peft_r32", "gflop", "fewest_mib", "share_of_limit", "peak_mib", "saved_mib", "adapter_mib",
    "trained", "launches", "extra_peak_mib",
)  # fmt: skip
POSITIVE = ("_ms", "tokens", "rounds", "over_frozen", "over_frozen_p20", "over_frozen_p80")
FAILURE = "failure"  # why a variant could not be measured, "" where it was; older files have no such column
NEEDED = (*PROVENANCE, *KEY, "q", "network", *NUMBERS)


def read_results(path: Path) -> list[Row]:
    """The rows of a result file of cases without those that failed (:func:`read_failures`), all values as text.

    OSError where there is no such file. ValueError where it has no rows or only such that failed, lacks a column, has
    two rows of one case and variant, or has text in a column of numbers.
    """
    rows = _read_all(path)
    measured = [row for row in rows if not row.get(FAILURE)]
    if not measured:
        raise ValueError(f"{path}: found {len(rows)} rows that failed and no other, expected results of a benchmark")
    return measured


def read_failures(path: Path) -> list[str]:
    """The rows of a result file that failed: case, variant and error in one line each. Errors as of read_results."""
    return [f"{title(row)}, {row['variant']}: {row[FAILURE]}" for row in _read_all(path) if row.get(FAILURE)]


def _read_all(path: Path) -> list[Row]:
    rows = read_rows(path, NEEDED)
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if key(row) in seen:
            raise ValueError(f"{path}: found {title(row)}, {row['variant']} twice, expected one row of each")
        seen.add(key(row))
        for column in NUMBERS:
            if row[column] and not _is_amount(row[column], column.endswith(POSITIVE)):
                raise ValueError(
                    f"{path}: found {row[column]!r} as {column} of {title(row)}, {row['variant']}, expected a number"
                    f"{' above 0' if column.endswith(POSITIVE) else ''} or nothing"
                )
    return rows


def read_rows(path: Path, needed: tuple[str, ...]) -> list[Row]:
    """The rows of a CSV file with the columns ``needed`` and at least one row. OSError or ValueError otherwise."""
    try:
        rows = read_csv(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; expected results of a benchmark there") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: found no CSV ({error}), expected results of a benchmark") from error
    if not rows:
        raise ValueError(f"{path}: found no rows, expected results of a benchmark")
    lacking = [name for name in needed if name not in rows[0]]
    if lacking:
        found = ", ".join(str(name)[:40] for name in list(rows[0])[:6])
        raise ValueError(
            f"{path}: found columns {found}, ... without {', '.join(lacking)}, expected results of a benchmark"
        )
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {line}: found more or fewer cells than columns, expected one a column")
    return rows


def _is_amount(text: str, positive: bool) -> bool:
    try:
        found = float(text)
    except ValueError:
        return False
    return math.isfinite(found) and (found > 0 or not positive)


def key(row: Row) -> tuple[str, ...]:
    """What identifies a row within a file, and finds the row of the same measurement in another file."""
    return tuple(row[name] for name in KEY)


def value(row: Row, column: str) -> float | None:
    """A number of a row; None where the cell is empty."""
    return float(row[column]) if row[column] else None


def number(row: Row, column: str) -> float:
    """A number of a row. ValueError naming row and column where the cell holds none."""
    try:
        return float(row[column])
    except ValueError as error:
        raise ValueError(
            f"{title(row)}, {row['variant']}: found {row[column]!r} as {column}, expected a number"
        ) from error


def title(row: Row) -> str:
    """What was measured, the variant aside."""
    return " ".join(_parts(row))


def _parts(row: Row) -> list[str]:
    point = {"slices": [f"S={row['stack']}"], "width": [f"width={row['in']}"]}.get(row["sweep"], [])
    return [row["case"], *point, f"r={row['rank']}", f"T={row['tokens']}", row["mode"], row["dtype"]]


def labels(rows: list[Row]) -> tuple[dict[str, str], str]:
    """Title -> a short name of the case, and what all cases have in common, which the short names leave out."""
    parts = {title(row): _parts(row) for row in rows}
    shared = set.intersection(*(set(found[1:]) for found in parts.values()))
    first = next(iter(parts.values()))
    names = {at: " ".join(part for part in found if part not in shared) for at, found in parts.items()}
    return names, ", ".join(part for part in first if part in shared)


def by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by title, then by variant, in the file's order."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(title(row), {})[row["variant"]] = row
    return found


def tcur_backend(rows: list[Row]) -> str:
    """The operator's fastest variant "tcur <backend>": the least total time over the cases that all backends ran.

    ValueError where there is no row of a backend.
    """
    known = operator_variants()
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["variant"] in known:
            times.setdefault(row["variant"], {})[" ".join(key(row)[:-1])] = number(row, "median_ms")
    if not times:
        raise ValueError(f"found no row of a backend, expected at least one of {', '.join(known)}")
    common = set.intersection(*(set(found) for found in times.values()))
    return min(times, key=lambda name: sum(times[name][case] for case in common))
