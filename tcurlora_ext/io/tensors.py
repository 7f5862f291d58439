"""Files of tensors: safetensors files; checkpoints, of which no code is unpickled; weights under a network's names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from . import packed
from .atomic import replacing

# Where training programs keep a network's state inside a checkpoint; nnU-Net has the last one.
STATES = ("state_dict", "model_state_dict", "model", "network_weights")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
# What wrappers put before a network's names: DataParallel and DDP, Lightning modules, trainers.
PREFIXES = ("module.", "model.", "net.", "network.", "backbone.")
# What torch.compile, FSDP and activation checkpointing put into names, at any place.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_tensors(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file; what is packed in it, as if it were not.

    Args:
        path: The file.
        expected: What the file should be, for the error message.

    Raises:
        ValueError: The file is not a complete safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: found no whole safetensors file, expected {expected} ({error})") from None
    try:
        return packed.unpack(metadata, tensors)
    except packed.DAMAGE as error:
        raise ValueError(f"{path}: the file is damaged where it is packed, expected {expected} ({error!r})") from None


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save a dictionary of tensors, numbers, strings, lists and dictionaries to `path`, atomically.

    Raises:
        OSError: Of :func:`tcurlora_ext.io.atomic.replacing`.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:  # torch's writer hides the system's error behind one of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _numpy_types() -> list[Any]:
    """NumPy's numbers and arrays, for ``weights_only``: best scores and the like lie beside weights.

    Their two constructors have moved from ``numpy.core`` to ``numpy._core``; files of both times are read.
    """
    makers: list[Any] = [np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]]
    named = [(make, f"numpy.{core}.multiarray.{make.__name__}") for make in makers for core in ("core", "_core")]
    return [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdSU"), *named]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: tensors, containers, plain and NumPy values; no other objects.

    Raises:
        ValueError: The file cannot be read that way, or does not hold a dictionary.
    """
    try:
        with torch.serialization.safe_globals(_numpy_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and EOF errors: torch.load has no common base for them
        raise ValueError(f"{path}: not a readable checkpoint ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _reason(error: Exception) -> str:
    """One line of what torch.load says in several."""
    foreign = re.search(r"Unsupported (?:global|class):? (?:GLOBAL )?(\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and foreign:
        return f"holds a {foreign[1]}, which is not loaded since that could run code; expected tensors and plain values"
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to load it with code
        return "found neither an archive by torch.save nor a pickle of tensors alone"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint, under the names that they have in the file.

    In a checkpoint the state is looked for under the keys of `STATES`, or else in its only dictionary of tensors.
    :func:`match_names` undoes the prefixes of wrappers, for which the network has to be known.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or it cannot be read or holds no tensors.
    """
    if not path.is_file():
        found = "found a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {found}; expected {_nearest_weights(path)}")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path, "pretrained weights")[1]
    else:
        content = _state(path, read_checkpoint(path))
        tensors = {name: value for name, value in content.items() if isinstance(name, str) and _is_tensor(value)}
        if not tensors:
            raise ValueError(f"{path}: holds no tensors (keys: {', '.join(map(str, list(content)[:5]))})")
    return tensors


def _nearest_weights(path: Path) -> str:
    """What to give in place of a path that is no file: the weights in a folder, or what there may be."""
    inside = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES) if path.is_dir() else []
    return f"the file in it, {inside[0]}" if len(inside) == 1 else f"pretrained weights ({', '.join(SUFFIXES)})"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _state(path: Path, content: dict[Any, Any]) -> dict[Any, Any]:
    """The dictionary inside a checkpoint that holds the network's tensors."""
    while key := next((key for key in STATES if isinstance(content.get(key), dict)), None):
        content = content[key]
    nested = {
        key: value for key, value in content.items() if isinstance(value, dict) and any(map(_is_tensor, value.values()))
    }
    if not nested or any(_is_tensor(value) and value.dim() > 0 for value in content.values()):
        return content
    if len(nested) > 1:
        raise ValueError(
            f"{path}: found tensors under {', '.join(map(str, nested))}, expected one of them alone or under "
            f"{', '.join(STATES)}"
        )
    return next(iter(nested.values()))


def match_names(tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The tensors under a network's names: without what wrappers have put before the names and into them.

    Prefixes may be stacked, as in ``module._orig_mod.``. A prefix goes only where that finds the most of the expected
    names, so that a network whose own names start with ``model.`` keeps them. Names that match nothing stay, less the
    prefix.

    Args:
        tensors: Of a file.
        expected: The network's names.
    """
    wanted = set(expected)
    if wanted.issuperset(tensors):
        return dict(tensors)
    plain = {name: unwrapped(name) for name in tensors}
    found = set(plain.values())
    # no prefix is the first candidate, and so wins against others that find as many names
    candidates = dict.fromkeys(["", *(prefix for name in plain.values() for prefix in _prefixes(name))])
    best = max(candidates, key=lambda prefix: sum(prefix + name in found for name in wanted))
    renamed = {name.removeprefix(best): tensors[own] for own, name in plain.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def unwrapped(name: str) -> str:
    """A tensor's name without what torch.compile, FSDP and activation checkpointing have put into it."""
    return _WRAPPERS.sub("", name)


def _prefixes(name: str) -> Iterator[str]:
    """What may be taken off a name: its first prefix, its first two, ..."""
    length = 0
    while further := next((prefix for prefix in PREFIXES if name.startswith(prefix, length)), None):
        length += len(further)
        yield name[:length]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinite values."""
    broken = []
    for name, value in tensors.items():
        # PyTorch has no isfinite for 8-bit floats
        value = value.float() if value.is_floating_point() and value.itemsize == 1 else value
        if not bool(torch.isfinite(value).all()):
            broken.append(name)
    return broken
