"""Layouts of data sets on disk, each in a file of its own; `read_layout` finds out which one a data set has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tcurlora_ext.io.records import read_json

from .files import Case, Files, Layout
from .folders import read_folders
from .lists import read_lists
from .nnunet import is_nnunet, read_nnunet

__all__ = ["Case", "Files", "Layout", "read_layout"]


def read_layout(data: Path) -> Layout:
    """The files of a data set, whichever layout it has.

    A JSON file is a data list of MONAI's. A folder is nnU-Net's where `dataset.json` has its keys or all images have
    numbers of channels; else it is the Medical Decathlon's where `dataset.json` has a list "training"; else image and
    label have the same name in two folders.

    Args:
        data: A folder or a JSON file.

    Raises:
        FileNotFoundError: It is not there, or a file or folder in it is missing.
        ValueError: It has none of these layouts; the message says what was found and what was expected.
    """
    data = Path(data)
    if data.is_file():
        if data.suffix != ".json":
            raise ValueError(f"{data}: found a file, expected the folder of a data set, or a data list (.json)")
        description = _described(data)
        if "training" not in description:
            known = ", ".join(map(str, description)) or "none"
            raise ValueError(f"{data}: found no list 'training' (keys: {known}), expected a data list of MONAI's form")
        return Layout(data.parent, data, description, read_lists(data, description))
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: no such folder; expected a data set with images, labels and a list of cases")
    path = data / "dataset.json"
    description = _described(path) if path.is_file() else {}
    if is_nnunet(data, description):
        files = read_nnunet(data, path, description)
    elif description.get("training") is not None:
        files = read_lists(path, description)
    else:
        files = read_folders(data)
    return Layout(data, path, description, files)


def _described(path: Path) -> dict[str, Any]:
    description = read_json(path)
    if not isinstance(description, dict):
        raise ValueError(f"{path}: found a {type(description).__name__}, expected an object with labels and training")
    return description
