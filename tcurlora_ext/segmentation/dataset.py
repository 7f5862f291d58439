"""Reading a segmentation data set: finding its files, checking them, and loading the volumes into memory.

`dataset.json` names the classes ("labels") and pairs images with labels ("training"), as in the Medical Decathlon.
Without "training", images lie in `imagesTr/` or `images/`, their labels under the same names in `labelsTr/` or
`labels/`. All are `.nii.gz` or `.nii`. `splits.json` holds lists of cases, at the top level ("train", "val") or one
level down ("few_shot": {"5_subjects_seed0": [...]}). Without it the cases are split at random from a seed.

Everything is checked before anything is trained or written: each error names the file, what was found and what was
expected. All chosen volumes are held in memory at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.cases import Case as Case  # also known by this name
from tcurlora_ext.segmentation.cases import choose_cases
from tcurlora_ext.segmentation.classes import check_foreground, declared_classes, observed_classes
from tcurlora_ext.segmentation.integrity import check_case
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.preparation import Preparation


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
    root: Path, *, train_list: str = "train", val_list: str = "val", val_fraction: float | None = None,
    seed: int = 0, labels: Sequence[str] | None = None,
) -> SegmentationDataset:  # fmt: skip
    """Find the cases of a data set and check every file of the two lists.

    Args:
        root: The data set's folder.
        train_list: The list of splits.json to train on.
        val_list: The list of splits.json to validate on.
        val_fraction: Fraction of the cases that is drawn for validation where there is no splits.json, and refused
            beside one; None: 0.2 where it is needed.
        seed: Of that draw.
        labels: Class names, background first, in place of those of dataset.json. Without either, the classes are the
            values in the training labels.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: A file is damaged, or does not fit the others; or the training labels have no foreground.

    Warns:
        UserWarning: Files are left out of a random split, or the validation labels have no foreground.
    """
    require_package("nibabel")
    require_package("monai")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a data set with images, labels and a list of cases")
    path = root / "dataset.json"
    description = read_json(path) if path.is_file() else {}
    if not isinstance(description, dict):
        raise ValueError(f"{path}: found a {type(description).__name__}, expected an object with labels and training")
    train, val = choose_cases(
        root, description, train_list=train_list, val_list=val_list, val_fraction=val_fraction, seed=seed
    )
    declared = declared_classes(path, description, labels)
    found = [check_case(case, declared) for case in (*train, *val)]
    channels = {number: case for (number, _), case in zip(found, (*train, *val), strict=True)}
    if len(channels) > 1:
        described = ", ".join(f"{case.image} has {number}" for number, case in channels.items())
        raise ValueError(f"{root}: found images of different channel counts ({described}), expected one count")
    values = [seen for _, seen in found]
    both = values[: len(train)], values[len(train) :]
    check_foreground(train, val, *both, declared)
    if declared is None:
        declared = observed_classes(train, val, *both)
    digest = hashlib.sha256()
    for case in (*train, *val):
        digest.update(case.image.read_bytes() + case.label.read_bytes())
    return SegmentationDataset(root, declared, next(iter(channels)), train, val, digest.hexdigest())


def load_volumes(cases: Sequence[Case], spacing: Sequence[float] | None) -> list[Volume]:
    """Read cases with MONAI and prepare them as :class:`Preparation` says.

    Args:
        cases: Checked, as those of :func:`read_dataset` are.
        spacing: Voxel size in mm that volumes are resampled to; None leaves them as they are.

    Raises:
        ValueError: Normalisation overflows float32.
    """
    require_package("monai")
    from monai.transforms.io.dictionary import LoadImaged

    load = LoadImaged(["image", "label"], ensure_channel_first=True)
    preparation = Preparation(spacing, label=True)
    volumes = []
    for case in cases:
        data = load({"image": str(case.image), "label": str(case.label)})
        data["label"].affine = data["image"].affine  # equal but for rounding, as check_case has seen to
        data = preparation.orient(data)
        truth = data["label"].clone()
        data = preparation.prepare(data, case.image)
        own = tuple(float(value) for value in truth.pixdim[:3])
        volumes.append(Volume(case.name, data["image"], data["label"], truth, own))
    return volumes
