"""File formats of volumes: their suffixes, and the packages that MONAI reads them by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tcurlora_ext.segmentation.packages import require_package

# Packages that MONAI reads a format by, any of which will do.
READERS = {".nii.gz": ("nibabel",), ".nii": ("nibabel",), ".mha": ("itk",), ".nrrd": ("itk", "nrrd")}
INSTALLED_AS = {"nrrd": "pynrrd"}
SUFFIXES = tuple(READERS)
NIFTI = (".nii.gz", ".nii")
FORMS = f"a volume ({', '.join(SUFFIXES)})"
# Volumes that are not read. Files of other kinds (.json, .txt) may lie beside volumes and mean nothing.
_OTHERS = (
    ".mhd", ".nhdr", ".hdr", ".img", ".img.gz", ".nii.bz2", ".mgh", ".mgz", ".npy", ".npz", ".dcm", ".tif", ".tiff"
)  # fmt: skip


def volume_suffix(path: Path) -> str | None:
    """The suffix of a file of a format that is read; None for other files."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def stem(name: str) -> str:
    """A file's name without the suffix of a format that is read."""
    return name.removesuffix(volume_suffix(Path(name)) or "")


def last_suffix(path: Path) -> str:
    """The last suffix, with the one before it where the file is packed."""
    packed = path.suffix.lower() in (".gz", ".bz2")
    return "".join(path.suffixes[-2:]) if packed else path.suffix


def other_volumes(folder: Path) -> list[Path]:
    """Files that hold volumes and are not read: of other formats, or with a suffix in capitals."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name[0] != "."
        and volume_suffix(path) is None
        and last_suffix(path).lower() in (*SUFFIXES, *_OTHERS)
    ]  # fmt: skip


def require_reader(path: Path) -> None:
    """Raise ValueError, which says what to install, unless the package that reads the format of a file is there."""
    suffix = volume_suffix(path) or ""
    packages = READERS[suffix]
    if suffix in NIFTI:
        require_package(packages[0])
    elif not any(find_spec(package) for package in packages):
        names = [INSTALLED_AS.get(package, package) for package in packages]
        raise ValueError(
            f"{path}: the package that reads {suffix} is not installed; expected {' or '.join(names)} "
            f"(pip install {names[0]}), or the volume as NIfTI"
        )


def load_image(paths: Sequence[Path], dtype: Any = torch.float32) -> Any:
    """Read a volume by MONAI: one file, or a file for each channel, of which all lie on the grid of the first.

    Args:
        paths: The files, in the order of the channels.
        dtype: Of the voxels.

    Returns:
        (C, X, Y, Z), a MetaTensor with the affine of the first file.
    """
    require_package("monai")
    from monai.transforms.io.array import LoadImage

    load = LoadImage(ensure_channel_first=True, dtype=dtype)
    with warnings.catch_warnings():  # of header fields that differ; what is used of them has been checked
        warnings.simplefilter("ignore")
        first, *others = (load(str(path)) for path in paths)
    return joined(first, others)


def joined(first: Any, others: Sequence[Any]) -> Any:
    """The channels of MetaTensors (C, X, Y, Z) in one, on the grid of the first: theirs are equal but for rounding."""
    for other in others:
        other.affine = first.affine
    return torch.cat([first, *others]) if others else first
