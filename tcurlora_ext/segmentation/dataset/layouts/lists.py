"""Lists of files in JSON: "training" and "validation" of {"image": ..., "label": ...}.

The Medical Decathlon's `dataset.json` has the first list; MONAI's data lists may have both, several files for an image,
and a number under "fold" in each entry. Paths start at the folder of the JSON file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tcurlora_ext.segmentation.dataset.formats import FORMS, stem, volume_suffix

from .files import Files, refuse_shared, short

LISTS = ("training", "validation")
_PAIR = '{"image": "./imagesTr/NAME.nii.gz", "label": "./labelsTr/NAME.nii.gz"}'


def read_lists(path: Path, description: dict[str, Any]) -> Files:
    """The files that a JSON file lists.

    Args:
        path: Of the JSON file.
        description: Its content.

    Raises:
        ValueError: A list has another form, a name is not unique, or a file belongs to two cases.
    """
    lists = {key: description[key] for key in LISTS if description.get(key) or key == "training"}
    parsed = [
        (key, *_parse(path, key, index, entry))
        for key, entries in lists.items()
        for index, entry in enumerate(_checked(path, key, entries))
    ]
    names = _names([images for _, images, _, _ in parsed], path.parent)
    files = Files({}, {}, path, path)
    for name, (key, images, label, fold) in zip(names, parsed, strict=True):
        if name in files.images:
            raise ValueError(
                f"{path}: '{key}' names {files.images[name][0]} and {images[0]}, expected each name once"
            )  # fmt: skip
        files.images[name], files.labels[name] = images, label
        if fold is not None:
            files.folds[name] = fold
    refuse_shared(path, ((images[0], files.labels[name]) for name, images in files.images.items()))
    counts = Counter(os.path.normpath(image) for images in files.images.values() for image in images)
    if twice := [image for image, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: found {twice[0]} twice, expected each image of one case and channel")
    chosen = tuple(name for name, (key, *_) in zip(names, parsed, strict=True) if key == "validation")
    return Files(files.images, files.labels, path, path, chosen if "validation" in lists else None, files.folds)


def _checked(path: Path, key: str, entries: Any) -> list[Any]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: found {short(entries)} as '{key}', expected a list of {_PAIR}")
    return entries


def _parse(path: Path, key: str, index: int, entry: Any) -> tuple[tuple[Path, ...], Path, int | None]:
    """The files of an image, the file of its label and the number of its fold."""
    where = f"{path}: entry {index} of '{key}'"
    image, label, fold = (entry.get(part) if isinstance(entry, dict) else None for part in ("image", "label", "fold"))
    several = isinstance(image, list) and bool(image)
    images = image if isinstance(image, list) and several else [image]
    if not isinstance(label, str) or not all(isinstance(name, str) for name in images):
        wrong = ", several files as its label" if isinstance(label, list) else ""
        raise ValueError(f"{where} is {short(entry)}{wrong}; expected {_PAIR}, or a list of files as its image")
    if fold is not None and (not isinstance(fold, int) or isinstance(fold, bool)):
        raise ValueError(f"{where} has the fold {short(fold)}, expected a whole number")
    files = [path.parent / name for name in (*images, label)]
    for file in files:
        if not volume_suffix(file):
            raise ValueError(f"{where} names {file.name}, expected {FORMS}")
    return tuple(files[:-1]), files[-1], fold


def _names(images: Sequence[tuple[Path, ...]], root: Path) -> list[str]:
    """Names of cases: those of their files, or where two cases have one, with those of the folders before."""
    names = [_name([stem(file.name) for file in files]) for files in images]
    twice = {name for name, count in Counter(names).items() if count > 1}
    for index, files in enumerate(images):
        if names[index] in twice:
            parts = Path(os.path.relpath(files[0], root)).with_name(names[index]).parts
            names[index] = "_".join(part for part in parts if part != "..")
    return names


def _name(stems: Sequence[str]) -> str:
    """What the names of one case's files have in common: "sub-1" of "sub-1_t1" and "sub-1_t2"."""
    if len(stems) == 1:
        return stems[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*stems, strict=False))
    common = "".join(letters[0] for letters in alike)
    whole = common.rstrip("_-.")
    if whole == common:  # the difference begins inside a word
        whole = common[: max(common.rfind(mark) for mark in "_-.") + 1].rstrip("_-.")
    return whole or stems[0]
