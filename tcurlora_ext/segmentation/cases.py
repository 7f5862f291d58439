"""The cases of a data set: which there are, which files are theirs, which of them train and which validate.

`dataset.json` may list its cases under "training", as in the Medical Decathlon: {"image": ..., "label": ...}, with
paths from the data set's folder. That list then says which cases there are and which label belongs to which image.
Without it, image and label have the same name in their folders.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcurlora_ext.io.records import read_json

SUFFIXES = (".nii.gz", ".nii")
VAL_FRACTION = 0.2  # of the cases, where neither splits.json nor the user says which validate
# Volumes that are not read. Files of other kinds (.json, .txt) may lie beside volumes and mean nothing.
_OTHER_VOLUMES = (
    ".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".img", ".img.gz", ".nii.bz2", ".mgh", ".mgz", ".npy", ".npz", ".dcm",
    ".tif", ".tiff",
)  # fmt: skip
_FORMS = f"a NIfTI volume ({', '.join(SUFFIXES)})"
_PAIR = '{"image": "./imagesTr/NAME.nii.gz", "label": "./labelsTr/NAME.nii.gz"}'


@dataclass(frozen=True)
class Case:
    """One subject's files."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class _Files:
    """Images and labels by the names of their cases, and the folders or the list that have said so."""

    images: dict[str, Path]
    labels: dict[str, Path]
    image_source: Path
    label_source: Path


def choose_cases(
    root: Path, description: dict[str, Any], *, train_list: str, val_list: str, val_fraction: float | None, seed: int
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """The training and the validation cases of a data set, which have no case in common.

    Args:
        root: The data set's folder.
        description: The content of dataset.json; empty where there is none.
        train_list: The list of splits.json to train on.
        val_list: The list of splits.json to validate on.
        val_fraction: Fraction of the cases that is drawn for validation where there is no splits.json; None:
            ``VAL_FRACTION``.
        seed: Of that draw.

    Raises:
        FileNotFoundError: A file, folder or list is missing.
        ValueError: A list has another form than expected, a case is not unique, two cases have one file, or a fraction
            is given where splits.json says which cases validate.
    """
    entries = description.get("training")
    files = _files_by_name(root) if entries is None else _paired_files(root, entries)
    if (root / "splits.json").is_file():
        if val_fraction is not None:
            raise ValueError(
                f"val-fraction: found {val_fraction} beside {root / 'splits.json'}, whose lists say which cases "
                "validate; expected one of the two"
            )
        train, val = (_listed(root / "splits.json", name, files) for name in (train_list, val_list))
    else:
        for name, default in ((train_list, "train"), (val_list, "val")):
            if name != default:
                raise FileNotFoundError(f"{root / 'splits.json'}: no such file; expected it to hold the list '{name}'")
        for unread in (root / "splits_final.json", root / "splits_final.pkl"):
            if unread.is_file():
                _warn(f"{unread}: not read, the cases are split at random; expected splits.json with train and val")
        if description.get("validation"):
            _warn(
                f"{root / 'dataset.json'}: the list 'validation' is not read, the cases of 'training' are split at "
                "random; expected splits.json with train and val"
            )
        train, val = _random_split(files, VAL_FRACTION if val_fraction is None else val_fraction, seed)
        for message in _unused(files, (*train, *val)):
            _warn(message)
    both = sorted({case.name for case in train} & {case.name for case in val})
    if both:
        raise ValueError(f"{root}: found {', '.join(both[:5])} in both lists, expected training and validation apart")
    _refuse_shared(root, ((case.image, case.label) for case in (*train, *val)))
    return train, val


def labelled_cases(root: Path, description: dict[str, Any], list_name: str | None) -> tuple[Case, ...]:
    """Cases that have a label: those of a list of splits.json, or all of them in the order of names.

    Args:
        root: The data set's folder.
        description: The content of dataset.json; empty where there is none.
        list_name: The list; None for all cases.

    Raises:
        FileNotFoundError: A file, folder or list is missing.
        ValueError: A list has another form than expected, or a case is not unique.
    """
    entries = description.get("training")
    files = _files_by_name(root) if entries is None else _paired_files(root, entries)
    if list_name is not None:
        return _listed(root / "splits.json", list_name, files)
    if not files.labels:
        raise ValueError(f"{files.label_source}: found no labels, expected at least one, {_FORMS}")
    return _all_cases(files)


def _all_cases(files: _Files) -> tuple[Case, ...]:
    return tuple(
        Case(name, _find(name, files.images, files.image_source, str(files.labels[name])), files.labels[name])
        for name in sorted(files.labels)
    )


def _refuse_shared(source: Path, pairs: Iterable[tuple[Path, Path]]) -> None:
    """Raise ValueError, naming them, where two images pair with one label or two labels with one image.

    Paths are compared as they are written: links to one file may stand for labels that are equal.
    """
    image_of: dict[str, Path] = {}
    label_of: dict[str, Path] = {}
    for image, label in pairs:
        for kind, file, partner, known in (("label", label, image, image_of), ("image", image, label, label_of)):
            other = known.setdefault(os.path.normpath(file), partner)
            if other is not partner:
                raise ValueError(
                    f"{source}: the {kind} {file} belongs to {other} and to {partner}, expected one of the two"
                )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # who called read_dataset


def _paired_files(root: Path, entries: Any) -> _Files:
    """The files of the list "training" of dataset.json."""
    path = root / "dataset.json"
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: found {_short(entries)} as 'training', expected a list of {_PAIR}")
    files = _Files({}, {}, path, path)
    for index, entry in enumerate(entries):
        pair = [entry.get("image"), entry.get("label")] if isinstance(entry, dict) else []
        names = [name for name in pair if isinstance(name, str)]
        if len(names) < 2:
            several = ", several files of one case" if any(isinstance(name, list) for name in pair) else ""
            raise ValueError(f"{path}: entry {index} of 'training' is {_short(entry)}{several}; expected {_PAIR}")
        image, label = (root / name for name in names)
        for file in (image, label):
            if not file.name.endswith(SUFFIXES):
                raise ValueError(f"{path}: entry {index} of 'training' names {file.name}, expected {_FORMS}")
        name = _stem(image.name)
        if name in files.images:
            raise ValueError(f"{path}: 'training' names {files.images[name]} and {image}, expected each name once")
        files.images[name], files.labels[name] = image, label
    _refuse_shared(path, zip(files.images.values(), files.labels.values(), strict=True))
    return files


def _files_by_name(root: Path) -> _Files:
    images, labels = _folder(root, "imagesTr", "images"), _folder(root, "labelsTr", "labels")
    return _Files(_volumes(images), _volumes(labels), images, labels)


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{root}: found neither {' nor '.join(f'{name}/' for name in names)}, expected one of them")


def _volumes(folder: Path) -> dict[str, Path]:
    """NIfTI files by name. Names that start with a dot are left out: Decathlon archives hold macOS's ._ files."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name[0] != "." and path.name.endswith(SUFFIXES):
            other = files.setdefault(_stem(path.name), path)
            if other != path:
                raise ValueError(f"{folder}: found {other.name} and {path.name}, expected one file for each case")
    return files


def _stem(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suffix(path: Path) -> str:
    """The last suffix, with the one before it where the file is packed."""
    packed = path.suffix.lower() in (".gz", ".bz2")
    return "".join(path.suffixes[-2:]) if packed else path.suffix


def other_volumes(folder: Path) -> list[Path]:
    """Files that hold volumes and are not read: of other formats, or with a suffix in capitals."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name[0] != "."
        and not path.name.endswith(SUFFIXES)
        and _suffix(path).lower() in (*SUFFIXES, *_OTHER_VOLUMES)
    ]


def contents(folder: Path) -> str:
    """What a folder holds, by suffix: "2 .mha, 1 folder"."""
    kinds = Counter(
        "folders" if path.is_dir() else _suffix(path) or "without a suffix"
        for path in folder.iterdir()
        if path.name[0] != "."
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no files"


def _find(wanted: str, files: dict[str, Path], place: Path, source: str) -> Path:
    """The file of this name, or the one whose name ends in it after "_": "006" finds hippocampus_006.nii.gz."""
    if wanted in files:
        return files[wanted]
    matches = [path for name, path in files.items() if name.endswith(f"_{wanted}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{source}: case '{wanted}' found as {matches[0]} and {matches[1]}, expected one file")
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: its list 'training' has no case '{wanted}', which {source} names")
    raise FileNotFoundError(
        f"{place}/{wanted}.nii.gz: no such file; {source} names the case '{wanted}'{_similar(place, wanted)}"
    )


def _similar(folder: Path, wanted: str) -> str:
    """What there is in place of a missing file: nnU-Net's form of its name, or another format."""
    if (path := next(iter(sorted(folder.glob(f"{wanted}_0000.*"))), None)) is not None:
        return f"; found {path.name}, nnU-Net's form with a number for the channel (_0000), which is not read"
    if (path := next((path for path in other_volumes(folder) if path.name.startswith(f"{wanted}.")), None)) is not None:
        return f"; found {path.name}, expected {_FORMS}"
    return ""


def check_exists(path: Path) -> None:
    """Raise FileNotFoundError, which names what there is in its place, unless the file of a volume is there."""
    if not path.is_file():
        similar = _similar(path.parent, _stem(path.name)) if path.parent.is_dir() else ""
        raise FileNotFoundError(f"{path}: no such file; expected {_FORMS}{similar}")


def _listed(path: Path, name: str, files: _Files) -> tuple[Case, ...]:
    """The cases of one list of splits.json."""
    chosen = _list_of(path, read_json(path), name)
    if not chosen:
        raise ValueError(f"{path}: list '{name}' is empty, expected at least one case")
    strange = [value for value in chosen if not isinstance(value, (str, int))]
    if strange:
        raise ValueError(f"{path}: list '{name}' holds {_short(strange[0])}, expected names of cases")
    names = [_stem(Path(str(value)).name) for value in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: list '{name}' holds {len(names) - len(set(names))} cases twice, expected each once")
    source = f"{path}, list '{name}',"
    cases = []
    for wanted in names:
        image = _find(wanted, files.images, files.image_source, source)
        own = _stem(image.name)
        cases.append(Case(own, image, _find(own, files.labels, files.label_source, source)))
    return tuple(cases)


def _list_of(path: Path, content: Any, name: str) -> list[Any]:
    """A list of splits.json by its full name ("train", "fold_0/train") or, where only one has it, by the last part."""
    form = '{"train": ["NAME", ...], "val": [...]}'
    if not isinstance(content, dict):
        folds = ""
        if isinstance(content, list) and content and isinstance(content[0], dict):
            folds = f" of {len(content)} objects (nnU-Net's form of folds)"
        raise ValueError(f"{path}: found a {type(content).__name__}{folds}, expected an object with lists: {form}")
    lists: dict[str, Any] = {}
    for key, value in content.items():
        lists |= {f"{key}/{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    full = [name] if name in lists else [key for key in lists if key.rpartition("/")[2] == name]
    if len(full) > 1:
        raise ValueError(f"{path}: found the list '{name}' as {', '.join(full)}, expected one of these full names")
    if not full:
        known = [key for key, value in lists.items() if isinstance(value, list)]
        raise ValueError(f"{path}: found no list '{name}', expected one of {', '.join(known) or f'those in {form}'}")
    chosen = lists[full[0]]
    if not isinstance(chosen, list):
        raise ValueError(f"{path}: found {_short(chosen)} as '{full[0]}', expected a list of names of cases")
    return chosen


def _random_split(files: _Files, fraction: float, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """All cases that have a label, with a `fraction` of them drawn for validation; (training, validation)."""
    if not 0 < fraction < 1:
        raise ValueError(f"val-fraction: found {fraction}, expected a number between 0 and 1")
    place = files.label_source
    if len(files.labels) < 2:
        there = f" (the folder holds {contents(place)})" if place.is_dir() else ""
        raise ValueError(
            f"{place}: found {len(files.labels)} labels{there}, expected at least 2 to split into training and "
            f"validation, each {_FORMS}"
        )
    cases = _all_cases(files)
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(cases))
    count = min(max(1, round(fraction * len(cases))), len(cases) - 1)
    chosen = set(order[:count].tolist())
    return (
        tuple(case for index, case in enumerate(cases) if index not in chosen),
        tuple(case for index, case in enumerate(cases) if index in chosen),
    )


def _unused(files: _Files, cases: Sequence[Case]) -> list[str]:
    """What lies in the folders and belongs to no case, in a line for each kind."""
    used = {case.image for case in cases}
    alone = [path for path in files.images.values() if path not in used]
    lines = []
    if alone:
        lines.append(f"{files.image_source}: {len(alone)} images have no label and are not used ({alone[0].name}, ...)")
    others = {place: other_volumes(place) for place in (files.image_source, files.label_source) if place.is_dir()}
    lines += [
        f"{place}: {len(unread)} volumes are not read ({unread[0].name}, ...), expected each {_FORMS}"
        for place, unread in others.items()
        if unread
    ]
    return lines
