"""JSON and CSV files, written atomically."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import write_bytes


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file. FileNotFoundError where there is none, ValueError where it is not valid JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a JSON file there")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """`rows` as a CSV file in UTF-8, with the first row's keys as header. Floats read back as the same values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` to `path` as CSV, atomically."""
    write_bytes(path, csv_bytes(rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; all values are strings."""
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
