"""Scans to predict: which there are, reading and checking one, and writing on its grid.

What is written lies on the voxels of the scan's file: for a NIfTI scan with its affine and its header.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.segmentation.cases import SUFFIXES as NIFTI
from tcurlora_ext.segmentation.cases import contents, other_volumes
from tcurlora_ext.segmentation.packages import require_package

# Packages that MONAI reads a format by, any of which will do.
READERS = {".nii.gz": ("nibabel",), ".nii": ("nibabel",), ".mha": ("itk",), ".nrrd": ("itk", "nrrd")}
INSTALLED_AS = {"nrrd": "pynrrd"}
FORMS = f"a volume ({', '.join(READERS)})"
# Cosine of the angle between two axes, up to which they are at right angles: headers as text have four digits.
UPRIGHT = 1e-3


@dataclass(frozen=True)
class Scan:
    """A file to predict.

    Attributes:
        name: The file's, without its suffix.
        path: The file.
        output: The name of its label map: the file's, or for a format that is not NIfTI ``<name>.nii.gz``.
    """

    name: str
    path: Path
    output: str


def find_scans(inputs: Sequence[Path]) -> list[Scan]:
    """The scans that files and folders hold: every volume of a folder, in the order of names.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file has another suffix, a folder has no volume, or two files have one name.

    Warns:
        UserWarning: A folder has volumes of formats that are not read.
    """
    if not inputs:
        raise ValueError("input: found none, expected files or a folder with scans")
    scans: dict[str, Scan] = {}
    for given in inputs:
        for path in _in_folder(given) if given.is_dir() else [_checked_file(given)]:
            name = path.name.removesuffix(_suffix(path) or "")
            scan = Scan(name, path, path.name if path.name.endswith(NIFTI) else f"{name}.nii.gz")
            other = scans.setdefault(name, scan)
            if other.path != path:
                raise ValueError(f"{path}: has the name of {other.path}, expected one scan for each name")
    return list(scans.values())


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file() and _suffix(path))
    unread = [path for path in other_volumes(folder) if path not in found]
    if not found:
        raise ValueError(f"{folder}: found no scan in this folder, which holds {contents(folder)}; expected {FORMS}")
    if unread:
        warnings.warn(
            f"{folder}: {len(unread)} volumes are not read ({unread[0].name}, ...), expected each {FORMS}", stacklevel=4
        )
    return found


def _checked_file(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected {FORMS}, or a folder with some")
    if _suffix(path) is None:
        raise ValueError(f"{path}: found a file of another kind, expected {FORMS}")
    return path


def read_scan(path: Path, channels: int) -> Tensor:
    """Read a scan by MONAI's reader of its format, and check it.

    Args:
        path: The file.
        channels: How many the network takes.

    Returns:
        (C, X, Y, Z) float32, with MONAI's affine.

    Raises:
        ValueError: The file cannot be read, or its content is not what the network takes. The message names the file,
            what was found and what was expected.
    """
    require_package("monai")
    from monai.transforms.io.array import LoadImage

    _require_reader(path)
    try:
        if path.name.endswith(NIFTI):
            _check_numbers(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Tensor = LoadImage(ensure_channel_first=True)(str(path))
    except _Refused as refusal:
        raise ValueError(str(refusal)) from None
    except Exception as error:  # the readers' errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}), expected a complete volume"
        ) from error
    _check_shape(path, image, channels)
    _check_affine(path, np.asarray(image.affine))  # type: ignore[attr-defined]
    _check_values(path, image)
    return image


class _Refused(ValueError):
    """What was found out about a file while it was read."""


def _require_reader(path: Path) -> None:
    suffix = _suffix(path) or ""
    packages = READERS[suffix]
    if suffix in NIFTI:
        require_package(packages[0])
    elif not any(find_spec(package) for package in packages):
        names = [INSTALLED_AS.get(package, package) for package in packages]
        raise ValueError(
            f"{path}: the package that reads {suffix} is not installed; expected {' or '.join(names)} "
            f"(pip install {names[0]}), or the scan as NIfTI"
        )


def _check_numbers(path: Path) -> None:
    """Raise unless the voxels of a NIfTI file are real numbers: MONAI drops imaginary parts with a warning."""
    import nibabel as nib

    dtype = nib.load(path).get_data_dtype()
    if dtype.kind not in "biuf":
        found = "colours (RGB)" if dtype.names else f"{dtype} numbers"
        raise _Refused(f"{path}: found voxels that are {found}, expected one real number each")


def _check_shape(path: Path, image: Tensor, channels: int) -> None:
    if image.ndim != 4:
        raise ValueError(f"{path}: found {image.ndim - 1} axes, expected 3, or 4 with one for the channels")
    if min(image.shape) < 1:
        raise ValueError(f"{path}: found shape {tuple(image.shape[1:])}, which is no voxel, expected a volume")
    if image.shape[0] != channels:
        shape = "x".join(map(str, image.shape[1:]))
        raise ValueError(
            f"{path}: found {image.shape[0]} channels of {shape} voxels, expected {channels} as in training"
        )


def _check_affine(path: Path, affine: NDArray[Any]) -> None:
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        raise ValueError(
            f"{path}: found the affine {affine[:3].tolist()}, expected finite numbers and no voxel size of 0"
        )
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if cosine > UPRIGHT:
        angle = float(np.degrees(np.arccos(cosine)))
        raise ValueError(
            f"{path}: found an affine that is not orthonormal: two of its axes are at {angle:.4g} degrees, expected "
            "right angles; resample the scan to an upright grid first"
        )


def _check_values(path: Path, image: Tensor) -> None:
    broken = int((~image.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{path}: found {broken} voxels that are NaN, infinite or beyond float32, expected finite intensities"
        )
    low, high = float(image.min()), float(image.max())
    if low == high:
        raise ValueError(f"{path}: found {low + 0.0:g} in every voxel, expected an image")  # 0 for -0


def to_file_order(values: NDArray[Any], affine: NDArray[Any]) -> NDArray[Any]:
    """Turn and flip an array (X, Y, Z, ...) from RAS back to the order of a file's voxels, exactly.

    Args:
        values: On the grid that the file's has become by orientation to RAS.
        affine: (4, 4), of the file.
    """
    from nibabel import orientations

    back = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.io_orientation(affine))
    turned: NDArray[Any] = orientations.apply_orientation(values, back)
    return np.ascontiguousarray(turned)


def write_volume(path: Path, values: NDArray[Any], scan: Path, affine: NDArray[Any]) -> None:
    """Write an array as NIfTI on the grid of a scan, atomically.

    The header is the scan's, but for what describes its voxels: their dtype, scaling and display range.

    Args:
        path: The file to write, with a NIfTI suffix.
        values: (X, Y, Z) or (X, Y, Z, classes), in the order of the scan's voxels and in the dtype to write.
        scan: Of which affine and header are taken where it is NIfTI.
        affine: (4, 4), for a scan of another format.
    """
    import nibabel as nib

    kind: Any = nib.Nifti1Image
    header = None
    if scan.name.endswith(NIFTI):
        like: Any = nib.load(scan)
        affine, header = like.affine, like.header.copy()
        kind = type(like)
        header.set_data_dtype(values.dtype)
        header["cal_min"] = header["cal_max"] = 0  # not set
    write_with(path, partial(nib.save, kind(values, affine, header)))
