"""Reading safetensors files whole: tensors by name and the strings of the header."""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import Tensor


def read_tensors(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's strings and the tensors of a file. ValueError, saying what was ``expected``, for a damaged one."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: found no whole safetensors file, expected {expected} ({error})") from None
