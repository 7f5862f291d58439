"""The folder of a run: when it may be written to, and what says how the run was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tcurlora_ext.io.records import read_json, write_json

PACKAGES = ("tcurlora_ext", "torch", "monai", "peft", "nilearn", "nibabel", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def check_folder(folder: Path, description: Mapping[str, Any], resume: bool) -> None:
    """ValueError unless the folder is new or empty, or `resume` goes on with a run of the same description.

    Nothing is written. `description` holds plain JSON values; "settings" is compared key by key.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a folder or nothing")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        raise ValueError(f"{folder}: the run folder is not empty; expected a new one, or --resume to go on in it")
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"{folder}: found no run.json, so this is no run to go on with; expected a folder of this command"
        )
    earlier = read_json(folder / "run.json")
    for part in description:
        if part in ("versions", "threads"):
            continue
        _compare(folder / "run.json", part, earlier.get(part), description[part])


def _compare(path: Path, name: str, earlier: Any, now: Any) -> None:
    if isinstance(earlier, dict) and isinstance(now, Mapping):
        for key in sorted(set(earlier) | set(now)):
            _compare(path, f"{name}.{key}", earlier.get(key), now.get(key))
    elif earlier != now:
        name = name.removeprefix("settings.")
        raise ValueError(f"{path}: the run has {name} = {earlier}, found {now} now; --resume needs the same settings")


def record(folder: Path, part: str, content: Mapping[str, Any]) -> None:
    """Add a part to run.json once it is known; ValueError where an earlier run had another."""
    description = read_json(folder / "run.json")
    if part in description:
        _compare(folder / "run.json", part, description[part], content)
    else:
        write_json(folder / "run.json", {**description, part: content})


def open_folder(folder: Path, description: Mapping[str, Any], resume: bool) -> None:
    """`check_folder`, then make the folder and write `run.json` where it is not there yet.

    A resumed run takes the number of CPU threads of its start: sums over another number differ in the last bits.
    """
    check_folder(folder, description, resume)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run.json").is_file():
        write_json(folder / "run.json", description)
    elif isinstance(threads := read_json(folder / "run.json").get("threads"), int):
        torch.set_num_threads(threads)
