"""Reading a segmentation data set: finding its files, checking them, and loading the volumes into memory.

:mod:`~tcurlora_ext.segmentation.dataset.layouts` finds the files, whichever layout the data set has;
:mod:`~tcurlora_ext.segmentation.dataset.splits` and :mod:`~tcurlora_ext.segmentation.dataset.cases` say which of them
train.

Everything is checked before anything is trained or written: each error names the file, what was found and what was
expected. All chosen volumes are held in memory at once.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tcurlora_ext.segmentation.dataset.cases import Split, choose_cases
from tcurlora_ext.segmentation.dataset.classes import (
    check_foreground,
    check_mapping,
    declared_classes,
    ignored_value,
    observed_classes,
)
from tcurlora_ext.segmentation.dataset.formats import load_image
from tcurlora_ext.segmentation.dataset.integrity import check_case
from tcurlora_ext.segmentation.dataset.layouts import Case as Case  # also known by this name
from tcurlora_ext.segmentation.dataset.layouts import Layout, read_layout
from tcurlora_ext.segmentation.dataset.preparation import Preparation
from tcurlora_ext.segmentation.dataset.subjects import few_subjects
from tcurlora_ext.segmentation.packages import require_package

IGNORED = -1  # in the labels of a Volume: the voxel counts neither in the loss nor in scores


@dataclass(frozen=True)
class SegmentationDataset:
    """Cases whose files have been checked.

    Attributes:
        root: The data set's folder.
        labels: Class names by label value; 0 is background.
        channels: Of every image.
        train: The training cases.
        val: The validation cases.
        fingerprint: SHA-256 of all files of these cases.
        origin: What divides the cases into these two, in words.
    """

    root: Path
    labels: dict[int, str]
    channels: int
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    fingerprint: str
    origin: str

    @property
    def division(self) -> str:
        """How many cases train and how many validate, and what divides them, in words."""
        return f"{len(self.train)} training and {len(self.val)} validation cases, by {self.origin}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes, in the order of their values."""
        return tuple(self.labels[value] for value in sorted(self.labels) if value)


@dataclass(frozen=True)
class Volume:
    """A case as training and evaluation need it.

    Attributes:
        name: The case's.
        image: (C, X, Y, Z) float32, normalised, at the network's voxel size.
        label: (1, X, Y, Z) on the same grid; ``IGNORED`` in voxels that do not count.
        truth: (1, X', Y', Z'), the label on the grid of its file, on which predictions are scored.
        spacing: Voxel size of ``truth`` in mm.
    """

    name: str
    image: Tensor
    label: Tensor
    truth: Tensor
    spacing: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of reading a data set that finetune, learn-factors and pretrain share: those of :func:`read_dataset`.

    Attributes:
        data_seed: Of the embedded subjects, of a random split, and of the draw of `shots`.
        shots: How many of the training subjects train; None: all of them.
        subject_pattern: Regular expression whose first group is the subject in the name of a case; None: BIDS names,
            and elsewhere each case is a subject.
    """

    train_list: str = "train"
    val_list: str = "val"
    val_fraction: float | None = None
    labels: tuple[str, ...] | None = None
    fold: int | None = None
    map_labels: dict[int, int] | None = None
    data_seed: int = 0
    shots: int | None = None
    subject_pattern: str | None = None

    @property
    def lists(self) -> dict[str, Any]:
        """What says which cases train and which validate: arguments of :func:`read_cases`."""
        return {
            "train_list": self.train_list, "val_list": self.val_list, "val_fraction": self.val_fraction,
            "seed": self.data_seed, "fold": self.fold, "shots": self.shots, "subject_pattern": self.subject_pattern,
        }  # fmt: skip

    def read_data(self, folder: Path) -> SegmentationDataset:
        """The data set in a folder, as :func:`read_dataset` finds and checks it."""
        return read_dataset(folder, labels=self.labels, map_labels=self.map_labels, **self.lists)


def read_dataset(
    root: Path, *, train_list: str = "train", val_list: str = "val", val_fraction: float | None = None,
    seed: int = 0, labels: Sequence[str] | None = None, fold: int | None = None,
    map_labels: Mapping[int, int] | None = None, shots: int | None = None, subject_pattern: str | None = None,
) -> SegmentationDataset:  # fmt: skip
    """Find the cases of a data set and check every file of the two lists.

    Args:
        root: The data set's folder, or a data list of MONAI's (.json).
        train_list: The list of splits.json to train on.
        val_list: The list of splits.json to validate on.
        val_fraction: Fraction of the cases that is drawn for validation where there is no splits.json, and refused
            beside one; None: 0.2 where it is needed.
        seed: Of that draw, and of the draw of `shots`.
        labels: Class names, background first, in place of those of dataset.json. Without either, the classes are the
            values in the training labels.
        fold: The fold of splits_final.json, or of a data list, whose lists are taken in place of splits.json.
        map_labels: Values that stand for others in labels; values that it does not name stay.
        shots: How many of the training subjects train, drawn at random: fewer of the same seed are among them. None:
            all of them.
        subject_pattern: Regular expression whose first group is the subject in the name of a case; None: that of BIDS,
            and elsewhere each case is a subject.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: A file is damaged, or does not fit the others; or the training labels have no foreground.

    Warns:
        UserWarning: Files are left out of a random split, or the validation labels have no foreground.
    """
    require_package("nibabel")
    require_package("monai")
    layout, mapping = read_layout(root), check_mapping(map_labels)
    split = read_cases(
        layout, train_list=train_list, val_list=val_list, val_fraction=val_fraction, seed=seed, fold=fold, shots=shots,
        subject_pattern=subject_pattern,
    )  # fmt: skip
    train, val = (with_label_values(cases, layout, mapping) for cases in (split.train, split.val))
    declared = declared_classes(layout.source, layout.description, labels, mapping)
    found = [check_case(case, declared) for case in (*train, *val)]
    channels = {number: case for (number, _), case in zip(found, (*train, *val), strict=True)}
    if len(channels) > 1:
        described = ", ".join(f"{case.image} has {number}" for number, case in channels.items())
        raise ValueError(f"{layout.root}: found images of different channel counts ({described}), expected one count")
    values = [set(seen.values()) for _, seen in found]
    for old in sorted(set(mapping).difference(*(seen for _, seen in found))):
        warnings.warn(
            f"map-labels: no label has the value {old}, so that {old}={mapping[old]} does nothing", stacklevel=3
        )
    both = values[: len(train)], values[len(train) :]
    check_foreground(train, val, *both, declared)
    if declared is None:
        declared = observed_classes(train, val, *both)
    digest = hashlib.sha256()
    for case in (*train, *val):
        for path in (*case.images, case.label):
            digest.update(path.read_bytes())
    channel_count = next(iter(channels))
    return SegmentationDataset(layout.root, declared, channel_count, train, val, digest.hexdigest(), split.origin)


def read_cases(layout: Layout, *, shots: int | None = None, subject_pattern: str | None = None, **lists: Any) -> Split:
    """The training and the validation cases of a data set, whose files are not read.

    Args:
        layout: The data set.
        shots: As for :func:`read_dataset`.
        subject_pattern: As for :func:`read_dataset`.
        lists: The arguments of :func:`~tcurlora_ext.segmentation.dataset.cases.choose_cases`.

    Raises:
        FileNotFoundError, ValueError: Those of `choose_cases`, or there are fewer than `shots` subjects.
    """
    split = choose_cases(layout, **lists)
    if shots is None:
        return split
    chosen = few_subjects([case.name for case in split.train], shots, lists["seed"], subject_pattern)
    train, subjects = tuple(split.train[index] for index in chosen), "subject" if shots == 1 else "subjects"
    return Split(
        train, split.val, f"{split.origin}; of the training cases those of {shots} {subjects}, drawn at random"
    )


def with_label_values(cases: Sequence[Case], layout: Layout, mapping: Mapping[int, int]) -> tuple[Case, ...]:
    """The cases, each with how the values in its label are read: mapped, and one of them ignored."""
    ignore, pairs = ignored_value(layout.source, layout.description), tuple(mapping.items())
    return tuple(replace(case, relabel=pairs, ignore=ignore) for case in cases)


def load_label(case: Case) -> Tensor:
    """The label of a case, (1, X, Y, Z) float32 with MONAI's affine: values mapped, ``IGNORED`` where none counts."""
    values: Tensor = load_image([case.label])
    label = values.clone()
    for old, new in case.relabel:
        label[values == old] = new
    if case.ignore is not None:
        label[label == case.ignore] = IGNORED
    return label


def load_volumes(cases: Sequence[Case], spacing: Sequence[float] | None) -> list[Volume]:
    """Read cases with MONAI and prepare them as :class:`Preparation` says.

    Args:
        cases: Checked, as those of :func:`read_dataset` are.
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.

    Raises:
        ValueError: Normalisation overflows float32.
    """
    preparation = Preparation(spacing, label=True)
    volumes = []
    for case in cases:
        data = {"image": load_image(case.images), "label": load_label(case)}
        data["label"].affine = data["image"].affine  # equal but for rounding, as check_case has seen to
        data = preparation.orient(data)
        truth = data["label"].clone()
        data = preparation.prepare(data, case.image)
        own = tuple(float(value) for value in truth.pixdim[:3])
        volumes.append(Volume(case.name, data["image"], data["label"], truth, own))
    return volumes
