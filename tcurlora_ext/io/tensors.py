"""Files of tensors: safetensors files read whole, and checkpoints of a run, of which nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .atomic import replacing


def read_tensors(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header's strings and the tensors of a file. ValueError, saying what was ``expected``, for a damaged one."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: found no whole safetensors file, expected {expected} ({error})") from None


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
