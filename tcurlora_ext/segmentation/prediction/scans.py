"""Scans to predict: which there are, reading and checking one, and writing on its grid.

What is written lies on the voxels of the scan's file: for a NIfTI scan with its affine and its header.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.segmentation.dataset.formats import (
    FORMS,
    NIFTI,
    joined,
    load_image,
    other_volumes,
    require_reader,
    stem,
    volume_suffix,
)
from tcurlora_ext.segmentation.dataset.integrity import grid_difference
from tcurlora_ext.segmentation.dataset.layouts.files import contents
from tcurlora_ext.segmentation.dataset.layouts.nnunet import CHANNEL
from tcurlora_ext.segmentation.packages import require_package

# Cosine of the angle between two axes, up to which they are at right angles: headers as text have four digits.
UPRIGHT = 1e-3


@dataclass(frozen=True)
class Scan:
    """A file to predict, or the files of its channels.

    Attributes:
        name: The file's, without its suffix and without the number of a channel.
        path: The file, or that of the first channel.
        output: The name of its label map: the file's, or for a format that is not NIfTI ``<name>.nii.gz``.
        others: Files with further channels, in their order.
    """

    name: str
    path: Path
    output: str
    others: tuple[Path, ...] = ()


def find_scans(inputs: Sequence[Path], channels: int = 1) -> list[Scan]:
    """The scans that files and folders hold: every volume of a folder, in the order of names.

    Files `case_0000`, `case_0001`, ... are the channels of one scan, as nnU-Net names them. Where the network takes one
    channel, they are that if the number is 0000 in all names.

    Args:
        inputs: Files and folders.
        channels: How many the network takes.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A file has another suffix, a folder has no volume, two files have one name, or the files of a scan
            are not those of the network's channels.

    Warns:
        UserWarning: A folder has volumes of formats that are not read.
    """
    if not inputs:
        raise ValueError("input: found none, expected files or a folder with scans")
    given = [path for place in inputs for path in (_in_folder(place) if place.is_dir() else [_checked_file(place)])]
    scans: dict[str, Scan] = {}
    for name, (path, *others) in _by_scan(list(dict.fromkeys(given)), channels):
        output = f"{name}{volume_suffix(path) if path.name.endswith(NIFTI) else NIFTI[0]}"
        other = scans.setdefault(name, Scan(name, path, output, tuple(others)))
        if other.path != path:
            raise ValueError(f"{path}: has the name of {other.path}, expected one scan for each name")
    return list(scans.values())


def _by_scan(paths: Sequence[Path], channels: int) -> list[tuple[str, list[Path]]]:
    """The files of each scan with its name."""
    matches = [CHANNEL.fullmatch(stem(path.name)) for path in paths]
    numbered: dict[tuple[Path, str], dict[int, Path]] = {}
    for path, match in zip(paths, matches, strict=True):
        if match is not None and (channels == 1 or not _has_channels(path)):
            numbered.setdefault((path.parent, match[1]), {})[int(match[2])] = path
    if channels == 1 and (None in matches or any(set(files) != {0} for files in numbered.values())):
        numbered = {}
    taken: dict[Path, tuple[str, list[Path]]] = {}
    for (_, name), files in numbered.items():
        if 0 not in files:
            continue  # numbers of scans
        if sorted(files) != list(range(channels)):
            found = ", ".join(f"_{number:04d}" for number in sorted(files))
            raise ValueError(
                f"{files[0]}: found the channels {found} of the scan '{name}', expected _0000 to _{channels - 1:04d} "
                "as in training"
            )
        ordered = [files[number] for number in range(channels)]
        taken |= {path: (name, ordered if path == ordered[0] else []) for path in ordered}
    found_all = [taken.get(path, (stem(path.name), [path])) for path in paths]
    return [(name, files) for name, files in found_all if files]


def warn_of_channels(scans: Sequence[Scan]) -> None:
    """Warn where files that a network of one channel takes as scans are numbered as the channels of fewer scans.

    Warns:
        UserWarning: All names end in numbers, and each name has the same ones, _0000 to _0001 or higher.
    """
    numbers: dict[tuple[Path, str], set[int]] = {}
    for scan in scans:
        match = CHANNEL.fullmatch(stem(scan.path.name))
        if match is None:
            return
        numbers.setdefault((scan.path.parent, match[1]), set()).add(int(match[2]))
    counts = {len(found) if found == set(range(len(found))) else 0 for found in numbers.values()}
    if len(counts) == 1 and (count := counts.pop()) > 1:
        warnings.warn(
            f"{scans[0].path.parent}: found the numbers _0000 to _{count - 1:04d} at the end of each name, as nnU-Net "
            f"numbers channels; the network takes one channel, so that each of the {len(scans)} files is a scan",
            stacklevel=3,  # who called predict_scans
        )


def _has_channels(path: Path) -> bool:
    """Whether the header of a NIfTI file says that it holds several channels."""
    import nibabel as nib

    try:
        return path.name.endswith(NIFTI) and nib.load(path).ndim > 3
    except Exception:  # a damaged file is named when it is read
        return False


def _in_folder(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file() and volume_suffix(path))
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
    if volume_suffix(path) is None:
        raise ValueError(f"{path}: found a file of another kind, expected {FORMS}")
    return path


def read_scan(path: Path, channels: int, others: Sequence[Path] = ()) -> Tensor:
    """Read a scan by MONAI's reader of its format, and check it.

    Args:
        path: The file.
        channels: How many the network takes.
        others: Files with further channels, in their order.

    Returns:
        (C, X, Y, Z) float32, with MONAI's affine.

    Raises:
        ValueError: The file cannot be read, or its content is not what the network takes. The message names the file,
            what was found and what was expected.
    """
    if not others:
        image = _read_file(path)
        _check_shape(path, image, channels)
        _check_content(path, image)
        return image
    images: list[Tensor] = []
    for file in (path, *others):
        image = _read_file(file)
        _check_shape(file, image, 1)
        _check_content(file, image)
        _check_alike(file, image, path, (images or [image])[0])
        images.append(image)
    together: Tensor = joined(images[0], images[1:])
    return together


def _read_file(path: Path) -> Tensor:
    require_package("monai")
    require_reader(path)
    try:
        if path.name.endswith(NIFTI):
            _check_numbers(path)
        image: Tensor = load_image([path])
    except _Refused as refusal:
        raise ValueError(str(refusal)) from None
    except Exception as error:  # the readers' errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}), expected a complete volume"
        ) from error
    return image


def _check_content(path: Path, image: Tensor) -> None:
    _check_affine(path, np.asarray(image.affine))  # type: ignore[attr-defined]
    _check_values(path, image)


def _check_alike(path: Path, image: Tensor, first: Path, like: Tensor) -> None:
    """Raise ValueError unless a channel lies on the grid of the first one."""
    if image.shape != like.shape:
        found, expected = ("x".join(map(str, part.shape[1:])) for part in (image, like))
        raise ValueError(f"{path}: found {found} voxels, expected {expected} as in {first}")
    a, b = (np.asarray(part.affine) for part in (image, like))  # type: ignore[attr-defined]
    if difference := grid_difference(a, b, image.shape[1:]):
        raise ValueError(f"{path}: found another affine than that of {first}: {difference}; expected the same grid")


class _Refused(ValueError):
    """What was found out about a file while it was read."""


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
