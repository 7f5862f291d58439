"""Files of a run: every one is replaced atomically, and nothing is unpickled.

Checkpoints are read with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tcurlora_ext.adapter.atomic import replacing, write_bytes


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file. FileNotFoundError or ValueError, each naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a JSON file there")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` to `path` atomically; the first row's keys are the header. Floats keep their shortest exact form."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, all values as text."""
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save tensors, numbers, strings, lists and dicts to `path` atomically."""
    with replacing(path) as temporary:
        torch.save(dict(content), temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint without unpickling anything but tensors and plain containers. ValueError names a damaged file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and EOF errors: torch.load has no common base for them
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def write_with(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer(temporary_path)` write a file that then becomes `path`, atomically."""
    with replacing(path) as temporary:
        writer(temporary)


def require_package(module: str) -> None:
    """ModuleNotFoundError with the command to run where `module` of the segmentation extra is not installed."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise ModuleNotFoundError(
            f"the package '{module}' is not installed; expected it for segmentation: "
            "pip install 'tcurlora_ext[segmentation]'",
            name=module,
        )
