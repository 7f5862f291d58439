"""The folder of a run: whether it may be written to, and run.json, which records how the run was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.io.versions import version_of
from tcurlora_ext.segmentation.methods import folder_name
from tcurlora_ext.segmentation.training.checkpoints import CHECKPOINT

# Settings to which a later call with --resume may add.
GROWING = ("methods", "seeds", "lr", "training_sets")
# Those that make no difference to the results: a later call may have others.
FREE = ("cache", "workers", "log", "reference", "measure", "subject_file")
RESULT = "result.json"  # of a method and a seed: its last file
PACKAGES = ("tcurlora_ext", "torch", "monai", "peft", "nilearn", "nibabel", "numpy", "scipy")


def describe(command: str, settings: Any) -> dict[str, Any]:
    """What run.json holds from the start: the command, its settings (a dataclass), versions and CPU threads."""
    values = asdict(settings)
    for key, value in values.items():
        if isinstance(value, dict):
            values[key] = {str(name): part for name, part in value.items()}  # as JSON has it
        else:
            values[key] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    versions = {
        "python": platform.python_version(),
        **{package: version_of(package) or "not installed" for package in PACKAGES},
    }
    return {"command": command, "settings": values, "versions": versions, "threads": torch.get_num_threads()}


def check_folder(
    folder: Path, description: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
) -> None:  # fmt: skip
    """Check that a run may write to its folder, and write nothing.

    Args:
        folder: The run folder.
        description: What run.json is to hold, as values that JSON has.
        resume: Whether an earlier run in the folder is continued.
        defaults: Of the settings: what an earlier version has not recorded, because there was no such setting.
        own: Names of what may lie in the folder before the run has begun.

    Raises:
        ValueError: The folder is neither new nor empty and `resume` is False; or the earlier run has another
            description, apart from versions and threads, and from methods and seeds that are added to it. The message
            names the setting that differs.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: found a file, expected a folder or nothing")
    if not folder.exists() or all(path.name in own for path in folder.iterdir()):
        return
    if not resume:
        raise ValueError(
            f"{folder}: the run folder is not empty; expected a new one, or --resume to continue the run in it"
        )
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"{folder}: found no run.json, so there is no run to resume; expected a run folder of this command"
        )
    earlier = read_json(folder / "run.json")
    for part in description:
        if part in ("versions", "threads"):
            continue
        before = earlier.get(part)
        if part == "settings" and isinstance(before, dict):
            before = {**(defaults or {}), **before}
            if isinstance(before.get("lr"), dict):
                before["lr"] = {name: rate for name, rate in before["lr"].items() if _has_trained(folder, name)}
        _compare(folder / "run.json", part, before, description[part])


def _has_trained(folder: Path, method: str) -> bool:
    """Whether something in a run, or in the runs of a comparison, was trained at a method's rate."""
    if method in ("head", "decoder"):  # they train beside others at their own rate
        return True
    files = (f"{runs}{folder_name(method)}/seed*/{name}" for runs in ("", "*/") for name in (RESULT, CHECKPOINT))
    return any(True for pattern in files for _ in folder.glob(pattern))


def _grown(earlier: Any, now: Any) -> bool:
    """Whether a setting has all that it had in the earlier run."""
    if isinstance(earlier, dict) and isinstance(now, Mapping):
        return all(now.get(key) == value for key, value in earlier.items())
    if isinstance(earlier, list) and isinstance(now, list):
        return set(earlier) <= set(now)
    return isinstance(earlier, int) and isinstance(now, int) and earlier <= now


def _compare(path: Path, name: str, earlier: Any, now: Any) -> None:
    setting = name.removeprefix("settings.")
    if setting in FREE or (setting in GROWING and _grown(earlier, now)):
        return
    if isinstance(earlier, dict) and isinstance(now, Mapping):
        # Of methods that only one of them has, there is no rate to compare.
        for key in sorted(set(earlier) & set(now) if setting == "lr" else set(earlier) | set(now)):
            _compare(path, f"{name}.{key}", earlier.get(key), now.get(key))
    elif earlier != now:
        raise ValueError(
            f"{path}: the run has {setting} = {earlier}, found {now} now; --resume needs the same settings"
        )


def record(folder: Path, part: str, content: Mapping[str, Any]) -> None:
    """Add an entry to run.json. ValueError where a resumed run has another content under it."""
    description = read_json(folder / "run.json")
    if part in description:
        _compare(folder / "run.json", part, description[part], content)
    else:
        write_json(folder / "run.json", {**description, part: content})


def open_folder(
    folder: Path, description: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
) -> None:  # fmt: skip
    """Call :func:`check_folder`, then make the folder and write `run.json` unless it is there.

    A resumed run sets PyTorch's CPU threads to as many as the run started with: sums by another number of threads
    differ in the last bits.
    """
    check_folder(folder, description, resume, defaults, own)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    if not path.is_file():
        write_json(path, description)
        return
    earlier = read_json(path)
    if earlier["settings"] != description["settings"]:  # methods or seeds are added
        write_json(path, {**earlier, "settings": description["settings"]})
    if isinstance(threads := earlier.get("threads"), int):
        torch.set_num_threads(threads)
