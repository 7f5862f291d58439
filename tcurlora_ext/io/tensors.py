"""Files of tensors: reading safetensors files; writing and reading checkpoints, of which no code is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .atomic import replacing


def read_tensors(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file.

    Args:
        path: The file.
        expected: What the file should be, for the error message.

    Raises:
        ValueError: The file is not a complete safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: found no whole safetensors file, expected {expected} ({error})") from None


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save a dictionary of tensors, numbers, strings, lists and dictionaries to `path`, atomically."""
    with replacing(path) as temporary:
        torch.save(dict(content), temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: objects other than tensors and containers are refused.

    Raises:
        ValueError: The file cannot be read that way, or does not hold a dictionary.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and EOF errors: torch.load has no common base for them
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content
