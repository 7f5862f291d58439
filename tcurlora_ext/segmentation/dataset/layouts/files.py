"""What every layout of a data set comes to: cases with their files, and finding one by its name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcurlora_ext.segmentation.dataset.formats import FORMS, last_suffix, other_volumes, stem, volume_suffix


@dataclass(frozen=True)
class Case:
    """One subject's files.

    Attributes:
        name: The case's.
        image: The file with its image, or with the first channels of it.
        label: The file with its label.
        others: Files with further channels, in their order.
        relabel: Pairs of a value in the file of the label and the value that stands for it.
        ignore: The label value, after `relabel`, of voxels that count neither in the loss nor in scores.
    """

    name: str
    image: Path
    label: Path
    others: tuple[Path, ...] = ()
    relabel: tuple[tuple[int, int], ...] = ()
    ignore: int | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """All files of the image, in the order of their channels."""
        return (self.image, *self.others)


@dataclass(frozen=True)
class Files:
    """Images and labels by the names of their cases, and the folders or the list that have said so.

    Attributes:
        images: One file for each case, or one for each channel.
        labels: Of each case.
        image_source: The folder of the images, or the JSON file that lists them.
        label_source: The same of the labels.
        validation: Cases that a data list names for validation; None where it has no such list.
        folds: The number of the fold of each case that has one in a data list.
    """

    images: dict[str, tuple[Path, ...]]
    labels: dict[str, Path]
    image_source: Path
    label_source: Path
    validation: tuple[str, ...] | None = None
    folds: dict[str, int] = field(default_factory=dict)

    def case(self, wanted: str, source: str) -> Case:
        """The case of this name, or the one whose name ends in it after "_".

        Raises:
            FileNotFoundError, ValueError: There is none, or there are several.
        """
        own = find_name(wanted, self.images, self.image_source, source)
        return self._case(own, own, find_name(own, self.labels, self.label_source, source))

    def all_cases(self) -> tuple[Case, ...]:
        """Every case that has a label, in the order of names."""
        return tuple(
            self._case(name, find_name(name, self.images, self.image_source, str(self.labels[name])), name)
            for name in sorted(self.labels)
        )

    def _case(self, name: str, image: str, label: str) -> Case:
        first, *others = self.images[image]
        return Case(name, first, self.labels[label], tuple(others))


@dataclass(frozen=True)
class Layout:
    """A data set as its files and lists describe it.

    Attributes:
        root: The folder that paths start from.
        source: The JSON file with classes and lists; it need not exist.
        description: Its content.
        files: Of the cases.
    """

    root: Path
    source: Path
    description: dict[str, Any]
    files: Files


def short(value: Any) -> str:
    """A value as text of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_folder(root: Path, *names: str) -> Path:
    """The first of these folders that is there. FileNotFoundError where none is."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    expected = f"neither {' nor '.join(f'{name}/' for name in names)}, expected one of them"
    raise FileNotFoundError(f"{root}: found {expected if len(names) > 1 else f'no {names[0]}/, expected it'}")


def volumes(folder: Path) -> dict[str, Path]:
    """Volumes by name. Names that start with a dot are left out: Decathlon archives hold macOS's ._ files."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name[0] != "." and volume_suffix(path):
            other = files.setdefault(stem(path.name), path)
            if other != path:
                raise ValueError(f"{folder}: found {other.name} and {path.name}, expected one file for each case")
    return files


def contents(folder: Path) -> str:
    """What a folder holds, by suffix: "2 .mha, 1 folder"."""
    kinds = Counter(
        "folders" if path.is_dir() else last_suffix(path) or "without a suffix"
        for path in folder.iterdir()
        if path.name[0] != "."
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no files"


def refuse_shared(source: Path, pairs: Iterable[tuple[Path, Path]]) -> None:
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


def find_name(wanted: str, files: dict[str, Any], place: Path, source: str) -> str:
    """The name in `files` that this is, or that ends in it after "_": "006" finds hippocampus_006."""
    if wanted in files:
        return wanted
    matches = [name for name in files if name.endswith(f"_{wanted}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        a, b = (_first(files[name]) for name in matches[:2])
        raise ValueError(f"{source}: case '{wanted}' found as {a} and {b}, expected one file")
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: its list 'training' has no case '{wanted}', which {source} names")
    raise FileNotFoundError(
        f"{place}/{wanted}.nii.gz: no such file; {source} names the case '{wanted}'{_similar(place, wanted)}"
    )


def _first(file: Path | tuple[Path, ...]) -> Path:
    return file[0] if isinstance(file, tuple) else file


def _similar(folder: Path, wanted: str) -> str:
    """What there is in place of a missing file: nnU-Net's form of its name, or another format."""
    if (path := next(iter(sorted(folder.glob(f"{wanted}_0000.*"))), None)) is not None:
        return (
            f"; found {path.name}, nnU-Net's form with a number for the channel (_0000), expected it of all images or "
            "of none"
        )
    if (path := next((path for path in other_volumes(folder) if path.name.startswith(f"{wanted}.")), None)) is not None:
        return f"; found {path.name}, expected {FORMS}"
    return ""


def check_exists(path: Path) -> None:
    """Raise FileNotFoundError, which names what there is in its place, unless the file of a volume is there."""
    if not path.is_file():
        similar = _similar(path.parent, stem(path.name)) if path.parent.is_dir() else ""
        found = "found a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {found}; expected {FORMS}{similar}")
