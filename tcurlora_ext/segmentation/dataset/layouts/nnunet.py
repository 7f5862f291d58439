"""nnU-Net's layout: `imagesTr/case_0000.nii.gz`, a file for each channel, and `labelsTr/case.nii.gz`.

Of version 2's `dataset.json`, `channel_names`, `labels`, `file_ending` and `dataset` (paths of files) are read. Names
of channels choose no normalisation here, as "CT" does in nnU-Net: it is the same for all volumes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcurlora_ext.segmentation.dataset.formats import SUFFIXES, stem, volume_suffix

from .files import Files, find_folder, short, volumes

CHANNEL = re.compile(r"(.+)_(\d{4})")


def is_nnunet(root: Path, description: Mapping[str, Any]) -> bool:
    """Whether `dataset.json` is nnU-Net's, or without one of version 2 all images have numbers that no label has."""
    if "channel_names" in description or "file_ending" in description:
        return True
    entries = description.get("training")
    entry = entries[0] if isinstance(entries, list) and entries else None
    if isinstance(entry, dict) and isinstance(entry.get("image"), str) and (root / entry["image"]).is_file():
        return False  # version 1 lists images under names that no file has
    images, labels = root / "imagesTr", root / "labelsTr"
    if not images.is_dir() or not labels.is_dir():
        return False
    names, known = ({stem(path.name) for path in _files(folder)} for folder in (images, labels))
    matches = [CHANNEL.fullmatch(name) for name in names]
    return bool(names) and not names & known and all(match is not None and match[1] in known for match in matches)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name[0] != "." and volume_suffix(path)]


def read_nnunet(root: Path, path: Path, description: Mapping[str, Any]) -> Files:
    """The files of nnU-Net's folders.

    Args:
        root: The data set's folder.
        path: Of dataset.json, for error messages.
        description: Its content.

    Raises:
        FileNotFoundError: A folder or the file of a channel is missing.
        ValueError: `dataset.json` has another form, or a file has another name than it should.
    """
    ending, channels = _ending(path, description), _channels(path, description)
    if "dataset" in description:
        return _listed(path, description["dataset"], channels)
    images, labels = find_folder(root, "imagesTr"), find_folder(root, "labelsTr")
    for folder in (images, labels):
        wrong = [file.name for file in _files(folder) if ending and not file.name.endswith(ending)]
        if wrong:
            raise ValueError(f"{folder}: found {wrong[0]}, expected files that end in {ending}, as {path} says")
    grouped = group_channels(volumes(images), images)
    known = volumes(labels)
    count = len(channels) or len(next(iter(grouped.values()), {}))
    chosen = {name: _all_channels(images, name, grouped.get(name, {}), count, channels, ending) for name in known}
    alone = {name: tuple(files.values()) for name, files in grouped.items() if name not in known}
    return Files(chosen | alone, known, images, labels)


def group_channels(files: Mapping[str, Path], folder: Path) -> dict[str, dict[int, Path]]:
    """Files `case_0000`, `case_0001` by the case's name and the channel's number. ValueError for other names."""
    grouped: dict[str, dict[int, Path]] = {}
    for name, file in files.items():
        match = CHANNEL.fullmatch(name)
        if match is None:
            expected = f"{name}_0000{volume_suffix(file)}, nnU-Net's form with a number for the channel"
            raise ValueError(f"{folder}: found {file.name}, expected {expected}")
        grouped.setdefault(match[1], {})[int(match[2])] = file
    return grouped


def _all_channels(
    folder: Path, name: str, found: Mapping[int, Path], count: int, names: Mapping[int, str], ending: str | None
) -> tuple[Path, ...]:
    """The files of a case in the order of its channels, of which none is missing and none too many."""
    for number in range(count):
        if number not in found:
            what = f"the channel {number}" + (f" ({names[number]})" if number in names else "")
            file = folder / f"{name}_{number:04d}{ending or SUFFIXES[0]}"
            raise FileNotFoundError(f"{file}: no such file; expected {what} of the case '{name}'")
    if more := sorted(set(found) - set(range(count))):
        raise ValueError(f"{found[more[0]]}: found the channel {more[0]}, expected {count} channels (from _0000)")
    return tuple(found[number] for number in range(count))


def _ending(path: Path, description: Mapping[str, Any]) -> str | None:
    ending = description.get("file_ending")
    if ending is not None and ending not in SUFFIXES:
        raise ValueError(f"{path}: found the file_ending {short(ending)}, expected one of {', '.join(SUFFIXES)}")
    return ending


def _channels(path: Path, description: Mapping[str, Any]) -> dict[int, str]:
    names = description.get("channel_names")
    if names is None:
        return {}
    try:
        found = {int(number): str(name) for number, name in names.items()}
    except (AttributeError, ValueError):
        found = {}
    if not found or sorted(found) != list(range(len(found))):
        form = '{"0": "T1", "1": "T2"}: every number from 0 with a name'
        raise ValueError(f"{path}: found {short(names)} as channel_names, expected {form}")
    return found


def _listed(path: Path, entries: Any, channels: Mapping[int, str]) -> Files:
    """The files of the entry "dataset": {"case": {"images": [...], "label": ...}}."""
    files = Files({}, {}, path, path)
    form = '{"CASE": {"images": ["FILE", ...], "label": "FILE"}}'
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: found {short(entries)} as 'dataset', expected {form}")
    for name, entry in entries.items():
        images, label = (entry.get(key) if isinstance(entry, dict) else None for key in ("images", "label"))
        if not isinstance(images, list) or not isinstance(label, str) or not all(isinstance(i, str) for i in images):
            raise ValueError(f"{path}: found {short(entry)} as the case '{name}' of 'dataset', expected {form}")
        count = len(channels) or len(next(iter(files.images.values()), images))
        if len(images) != count or not images:
            raise ValueError(f"{path}: found {len(images)} images of the case '{name}', expected {max(count, 1)}")
        files.images[name] = tuple(path.parent / image for image in images)
        files.labels[name] = path.parent / label
    return files
