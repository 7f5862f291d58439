"""Reading a segmentation data set: finding its files, checking them, and loading the volumes into memory.

Images lie in `imagesTr/` or `images/`, their labels under the same names in `labelsTr/` or `labels/`, as `.nii.gz` or
`.nii`. `dataset.json` names the classes ("labels", as in the Medical Decathlon). `splits.json` holds lists of cases, at
the top level ("train", "val") or one level down ("few_shot": {"5_subjects_seed0": [...]}). Without it the cases are
split at random from a seed.

Everything is checked before anything is trained or written: each error names the file, what was found and what was
expected. All chosen volumes are held in memory at once.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.packages import require_package

SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Case:
    """One subject's files."""

    name: str
    image: Path
    label: Path


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
    """

    root: Path
    labels: dict[int, str]
    channels: int
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    fingerprint: str

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
        label: (1, X, Y, Z) on the same grid.
        truth: (1, X', Y', Z'), the label on the grid of its file, on which predictions are scored.
        spacing: Voxel size of ``truth`` in mm.
    """

    name: str
    image: Tensor
    label: Tensor
    truth: Tensor
    spacing: tuple[float, ...]


def read_dataset(
    root: Path, *, train_list: str = "train", val_list: str = "val", val_fraction: float = 0.2, seed: int = 0,
    labels: Sequence[str] | None = None,
) -> SegmentationDataset:  # fmt: skip
    """Find the cases of a data set and check every file of the two lists.

    Args:
        root: The data set's folder.
        train_list: The list of splits.json to train on.
        val_list: The list of splits.json to validate on.
        val_fraction: Fraction of the cases that is drawn for validation where there is no splits.json.
        seed: Of that draw.
        labels: Class names, background first, in place of those of dataset.json. Without either, the classes are the
            values in the training labels.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: A file is damaged, or does not fit the others.
    """
    require_package("nibabel")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a data set with images, labels and a list of cases")
    description = read_json(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    images, masks = _folder(root, "imagesTr", "images"), _folder(root, "labelsTr", "labels")
    if (root / "splits.json").is_file():
        train = _listed(root / "splits.json", train_list, images, masks)
        val = _listed(root / "splits.json", val_list, images, masks)
    else:
        train, val = _random_split(root, images, masks, val_fraction, seed, train_list)
    both = sorted({case.name for case in train} & {case.name for case in val})
    if both:
        raise ValueError(f"{root}: found {', '.join(both[:5])} in both lists, expected training and validation apart")
    declared = _declared(root / "dataset.json", description, labels)
    found = [_check_case(case, declared) for case in (*train, *val)]
    channels = {number: case for (number, _), case in zip(found, (*train, *val), strict=True)}
    if len(channels) > 1:
        described = ", ".join(f"{case.image} has {number}" for number, case in channels.items())
        raise ValueError(f"{root}: found images of different channel counts ({described}), expected one count")
    if declared is None:
        declared = _observed(found, train, val)
    digest = hashlib.sha256()
    for case in (*train, *val):
        digest.update(case.image.read_bytes() + case.label.read_bytes())
    return SegmentationDataset(root, declared, next(iter(channels)), train, val, digest.hexdigest())


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{root}: found neither {' nor '.join(f'{name}/' for name in names)}, expected one of them")


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.stem)


def _volumes(folder: Path) -> dict[str, Path]:
    """NIfTI files by stem. Names that start with a dot are left out: Decathlon archives hold macOS's ._ files."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.name[0] != ".")
    return {_stem(path): path for path in files}


def _find(wanted: str, files: dict[str, Path], folder: Path, source: str) -> Path:
    """The file of this name, or the one whose name ends in it after "_": "006" finds hippocampus_006.nii.gz."""
    if wanted in files:
        return files[wanted]
    matches = [path for stem, path in files.items() if stem.endswith(f"_{wanted}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{source}: case '{wanted}' found as {matches[0]} and {matches[1]}, expected one file")
    raise FileNotFoundError(f"{folder}/{wanted}.nii.gz: no such file; {source} names the case '{wanted}'")


def _listed(path: Path, name: str, images: Path, masks: Path) -> tuple[Case, ...]:
    """The cases of one list of splits.json."""
    content = read_json(path)
    lists: dict[str, Any] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        lists.update(value if isinstance(value, dict) else {key: value} if isinstance(value, list) else {})
    if name not in lists:
        raise ValueError(f"{path}: found no list '{name}', expected one of {', '.join(lists) or 'train, val'}")
    if not isinstance(lists[name], list) or not lists[name]:
        raise ValueError(f"{path}: list '{name}' is empty, expected at least one case")
    names = [str(value) for value in lists[name]]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: list '{name}' holds {len(names) - len(set(names))} cases twice, expected each once")
    image_files, mask_files = _volumes(images), _volumes(masks)
    source = f"{path}, list '{name}',"
    return tuple(
        Case(_stem(image), image, _find(_stem(image), mask_files, masks, source))
        for image in (_find(wanted, image_files, images, source) for wanted in names)
    )


def _random_split(
    root: Path, images: Path, masks: Path, fraction: float, seed: int, train_list: str
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """All cases that have a label, with a `fraction` of them drawn for validation; (training, validation)."""
    if train_list != "train":
        raise FileNotFoundError(f"{root / 'splits.json'}: no such file; expected it to hold the list '{train_list}'")
    if not 0 < fraction < 1:
        raise ValueError(f"val-fraction: found {fraction}, expected a number between 0 and 1")
    image_files, mask_files = _volumes(images), _volumes(masks)
    names = sorted(mask_files)
    if len(names) < 2:
        raise ValueError(
            f"{masks}: found {len(names)} labels, expected at least 2 to split into training and validation"
        )
    cases = [Case(name, _find(name, image_files, images, str(mask_files[name])), mask_files[name]) for name in names]
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(cases))
    count = min(max(1, round(fraction * len(cases))), len(cases) - 1)
    chosen = set(order[:count].tolist())
    return (
        tuple(case for index, case in enumerate(cases) if index not in chosen),
        tuple(case for index, case in enumerate(cases) if index in chosen),
    )


def _declared(path: Path, description: Any, labels: Sequence[str] | None) -> dict[int, str] | None:
    """Class names by label value, from `labels` or from dataset.json: {"0": "background"} or {"background": 0}."""
    if labels is not None:
        if len(labels) < 2:
            raise ValueError(f"labels: found {list(labels)}, expected background and at least one class")
        return dict(enumerate(labels))
    content = description.get("labels") if isinstance(description, dict) else None
    if content is None:
        return None
    try:
        pairs = {int(key): str(value) for key, value in content.items()}
    except (ValueError, AttributeError):
        try:
            pairs = {int(value): str(key) for key, value in content.items()}
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f'{path}: found labels {content}, expected {{"0": "background", "1": ...}}') from None
    if sorted(pairs) != list(range(len(pairs))) or len(pairs) < 2:
        raise ValueError(f"{path}: found the label values {sorted(pairs)}, expected 0, 1, ... without a gap")
    return dict(sorted(pairs.items()))


def read_volume(path: Path) -> NDArray[Any]:
    """The voxels of a NIfTI file. FileNotFoundError where there is none, ValueError where it cannot be read."""
    import nibabel as nib

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a NIfTI volume")
    try:
        return np.asarray(nib.load(path).dataobj)
    except Exception as error:  # gzip, zlib, EOF and nibabel errors: no common base
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), expected a complete NIfTI file"
        ) from error


def _check_case(case: Case, declared: dict[int, str] | None) -> tuple[int, set[int]]:
    """Check the files of one case; returns the image's channel count and the label's values."""
    image, label = read_volume(case.image), read_volume(case.label)
    if image.ndim not in (3, 4):
        raise ValueError(f"{case.image}: found {image.ndim} axes, expected 3, or 4 with channels last")
    if label.shape != image.shape[:3]:
        raise ValueError(f"{case.label}: found shape {label.shape}, expected {image.shape[:3]} as in {case.image}")
    if not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise ValueError(f"{case.image}: found {count} voxels that are NaN or infinite, expected finite intensities")
    if image.min() == image.max():
        raise ValueError(f"{case.image}: found {image.min()} in every voxel, expected an image")
    values = np.unique(label)
    strange = [value for value in values if value != int(value) or value < 0]
    if declared is not None:
        strange = [value for value in values if value not in declared]
    if strange:
        expected = "whole numbers from 0" if declared is None else ", ".join(f"{v} ({n})" for v, n in declared.items())
        found = ", ".join(f"{value:g} ({int((label == value).sum())} voxels)" for value in strange[:5])
        raise ValueError(f"{case.label}: found label values {found}, expected {expected}")
    return image.shape[3] if image.ndim == 4 else 1, {int(value) for value in values}


def _observed(found: Sequence[tuple[int, set[int]]], train: Sequence[Case], val: Sequence[Case]) -> dict[int, str]:
    """The classes where none are declared: the values in the training labels. ValueError for others in validation."""
    values: set[int] = {0}.union(*(seen for _, seen in found[: len(train)]))
    if sorted(values) != list(range(len(values))) or len(values) < 2:
        raise ValueError(
            f"{train[0].label.parent}: found the label values {sorted(values)} in training cases, expected 0, 1, ... "
            "without a gap; name them in dataset.json or with --labels"
        )
    for case, (_, seen) in zip(val, found[len(train) :], strict=True):
        if seen - values:
            raise ValueError(
                f"{case.label}: found label values {sorted(seen - values)}, expected {sorted(values)} as in training; "
                "name the classes in dataset.json or with --labels"
            )
    return {value: "background" if value == 0 else f"label {value}" for value in sorted(values)}


def load_volumes(cases: Sequence[Case], spacing: Sequence[float] | None) -> list[Volume]:
    """Read and prepare cases with MONAI: RAS orientation, resampled to `spacing` in mm unless it is None, normalised.

    Intensities are clipped to the 0.5th and 99.5th percentile and normalised to mean 0 and standard deviation 1, per
    volume and channel: scanners share no intensity scale (maxima from 112 to 1.7e6 within one real data set).
    """
    require_package("monai")
    from monai.transforms import (
        Compose,
        EnsureTyped,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        ScaleIntensityRangePercentilesd,
        Spacingd,
    )

    keys = ["image", "label"]
    volumes = []
    with (
        warnings.catch_warnings()
    ):  # MONAI warns that a default for axis names will change; "RAS" means the same in both
        warnings.simplefilter("ignore")
        read = Compose([LoadImaged(keys, ensure_channel_first=True), Orientationd(keys, axcodes="RAS")])
        scale = [
            ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True),
            NormalizeIntensityd("image", channel_wise=True),
            EnsureTyped(keys, dtype=torch.float32, track_meta=True),
        ]
        if spacing is not None:
            scale.insert(0, Spacingd(keys, pixdim=tuple(spacing), mode=("bilinear", "nearest")))
        prepare = Compose(scale)
        for case in cases:
            data = read({"image": str(case.image), "label": str(case.label)})
            truth = data["label"].clone()
            data = prepare(data)
            own = tuple(float(value) for value in truth.pixdim[:3])
            volumes.append(Volume(case.name, data["image"], data["label"], truth, own))
    return volumes
