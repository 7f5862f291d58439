"""Checking the files of a case: they can be read, hold numbers, fit each other, and lie on one grid in space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcurlora_ext.segmentation.dataset.formats import NIFTI, load_image, require_reader
from tcurlora_ext.segmentation.dataset.layouts.files import Case, check_exists

# How far apart the same voxel of image and label may lie, in voxels. Headers round to float32 or to four digits, which
# is 0.03 voxels over 512 of them; a label that is a tenth of a voxel off still is on the same voxels.
GRID_TOLERANCE = 0.1


@dataclass(frozen=True)
class _File:
    """What is checked of a file: its voxels, with the header's scaling applied, and where they lie.

    Attributes:
        path: The file.
        voxels: (X, Y, Z), or (X, Y, Z, C).
        affine: (4, 4), to mm in RAS.
        scaling: The header's slope and intercept.
        headless: Whether the header has no affine.
    """

    path: Path
    voxels: NDArray[Any]
    affine: NDArray[Any]
    scaling: tuple[float, float] = (1, 0)
    headless: bool = False


def check_case(case: Case, declared: dict[int, str] | None) -> tuple[int, dict[int, int]]:
    """Check the files of one case.

    Args:
        case: Its files.
        declared: Class names by label value; None where any whole numbers from 0 are classes.

    Returns:
        The image's channel count; and by each value in the label, but for the one that is ignored, the value that it
        stands for.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read or does not hold what it should; or image and label differ in shape or grid.
    """
    first = _read(case.image)
    channels = _channels_of(first)
    for path in case.others:
        other = _read(path)
        channels += _channels_of(other)
        if other.voxels.shape[:3] != first.voxels.shape[:3]:
            raise ValueError(
                f"{path}: found shape {other.voxels.shape}, expected {first.voxels.shape[:3]} as in {case.image}"
            )
        _check_image(path, other.voxels)
        _check_grid(first, other, "channel")
    if case.others and channels != len(case.images):
        raise ValueError(f"{case.image}: found {channels} channels in {len(case.images)} files, expected one in each")
    label = _read(case.label)
    if label.voxels.shape == (*first.voxels.shape[:3], 1):
        label = replace(label, voxels=label.voxels[..., 0])
    if label.voxels.shape != first.voxels.shape[:3]:
        raise ValueError(
            f"{case.label}: found shape {label.voxels.shape}, expected {first.voxels.shape[:3]} as in {case.image}"
        )
    _check_image(case.image, first.voxels)
    values = _label_values(case, label, declared)
    _check_grid(first, label, "label")
    return channels, values


def _channels_of(file: _File) -> int:
    axes = file.voxels.ndim
    if axes not in (3, 4):
        vector = ", a NIfTI vector image" if axes == 5 and file.voxels.shape[3] == 1 else ""
        raise ValueError(f"{file.path}: found {axes} axes{vector}, expected 3, or 4 with channels last")
    return file.voxels.shape[3] if axes == 4 else 1


def _read(path: Path) -> _File:
    check_exists(path)
    require_reader(path)
    whole = "NIfTI file" if path.name.endswith(NIFTI) else "volume"
    try:
        file = _read_nifti(path) if path.name.endswith(NIFTI) else _read_other(path)
    except Exception as error:  # gzip, zlib, EOF, nibabel's and ITK's errors: no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}), expected a complete {whole}"
        ) from error
    if file.voxels.dtype.kind not in "biuf":
        found = "colours (RGB)" if file.voxels.dtype.names else f"{file.voxels.dtype} numbers"
        raise ValueError(f"{path}: found voxels that are {found}, expected one real number each")
    if file.voxels.size == 0:
        raise ValueError(f"{path}: found shape {file.voxels.shape}, which is no voxel, expected a volume")
    return file


def _read_nifti(path: Path) -> _File:
    """A NIfTI file by nibabel, with the header as MONAI corrects it."""
    import nibabel as nib
    from monai.data.utils import correct_nifti_header_if_necessary

    file: Any = nib.load(path)
    voxels = np.asarray(file.dataobj)
    scaling = (file.dataobj.slope, file.dataobj.inter)
    file = correct_nifti_header_if_necessary(file)
    headless = file.header["sform_code"] == 0 and file.header["qform_code"] == 0
    return _File(path, voxels, file.affine, scaling, bool(headless))


def _read_other(path: Path) -> _File:
    """A file of another format by MONAI's reader; float64 holds every value of its voxels."""
    image = load_image([path], np.float64)
    voxels = np.moveaxis(np.asarray(image), 0, -1)
    return _File(path, voxels[..., 0] if voxels.shape[-1] == 1 else voxels, np.asarray(image.affine, dtype=np.float64))


def _check_image(path: Path, image: NDArray[Any]) -> None:
    _check_finite(path, image, "finite intensities")
    with np.errstate(over="ignore"):
        single = image.astype(np.float32)  # what the network gets
    if not np.isfinite(single).all():
        count, largest = int((~np.isfinite(single)).sum()), np.abs(image).max()
        raise ValueError(
            f"{path}: found {count} voxels beyond float32 (up to {largest:.3g}), expected less than 3.4e38"
        )
    if single.min() == single.max():
        raise ValueError(f"{path}: found {single.min() + 0.0} in every voxel, expected an image")  # 0 for -0


def _check_finite(path: Path, voxels: NDArray[Any], expected: str) -> None:
    count = int((~np.isfinite(voxels)).sum())
    if count:
        raise ValueError(f"{path}: found {count} voxels that are NaN or infinite, expected {expected}")


def _label_values(case: Case, file: _File, declared: dict[int, str] | None) -> dict[int, int]:
    """What each value of a label stands for, without the ignored one. ValueError where one is no class."""
    path, label = case.label, file.voxels
    mapped = dict(case.relabel)
    expected = "whole numbers from 0" if declared is None else ", ".join(f"{v} ({n})" for v, n in declared.items())
    if mapped:
        expected += f"; {', '.join(f'{old} for {new}' for old, new in mapped.items())}"
    if case.ignore is not None:
        expected += f"; {case.ignore} (ignore)"
    _check_finite(path, label, expected)
    values = {value.item(): mapped.get(value.item(), value.item()) for value in np.unique(label)}
    if declared is None:
        strange = [value for value, new in values.items() if new != int(new) or new < 0]
    else:
        strange = [value for value, new in values.items() if new not in declared and new != case.ignore]
    if strange:
        found = ", ".join(f"{value:g} ({int((label == value).sum())} voxels)" for value in strange[:5])
        slope, intercept = file.scaling
        scaled = "" if (slope, intercept) == (1, 0) else f" after its header's scaling by {slope:g} and {intercept:g}"
        raise ValueError(f"{path}: found label values {found}{scaled}, expected {expected}")
    return {int(old): int(new) for old, new in values.items() if new != case.ignore}


def _check_grid(image: _File, other: _File, kind: str) -> None:
    """Raise ValueError unless the voxels of an image and of its label or further channel lie at the same places."""
    for file in (image, other):
        if not np.isfinite(file.affine).all() or np.linalg.det(file.affine[:3, :3]) == 0:
            matrix = file.affine[:3].tolist()
            raise ValueError(f"{file.path}: found the affine {matrix}, expected finite numbers and no voxel size of 0")
    if difference := grid_difference(other.affine, image.affine, other.voxels.shape[:3]):
        headless = " (it has neither sform nor qform)" if other.headless else ""
        raise ValueError(
            f"{other.path}: found another affine than that of {image.path}{headless}: {difference}, expected the same "
            f"grid; where they match all the same, save the {kind} with the image's affine"
        )


def grid_difference(affine: NDArray[Any], like: NDArray[Any], shape: Sequence[int]) -> str:
    """How the places of a volume's voxels differ from those of an image; empty where no voxel is off by a tenth.

    Args:
        affine: (4, 4), of the volume.
        like: (4, 4), of the image.
        shape: (X, Y, Z), of both.
    """
    corners = np.array([(*corner, 1) for corner in product(*((0, length - 1) for length in shape))])
    apart = float(np.linalg.norm((corners @ (affine - like).T)[:, :3], axis=1).max())
    if apart <= GRID_TOLERANCE * min(np.linalg.norm(like[:3, :3], axis=0)):
        return ""
    return f"{_differences(affine, like)}; its voxels lie up to {apart:.3g} mm from the image's"


def _differences(a: NDArray[Any], b: NDArray[Any]) -> str:
    """What differs between an affine and that of the image: orientation, directions, voxel sizes, origin."""
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import aff2axcodes

    sizes = voxel_sizes(a), voxel_sizes(b)
    axes = "".join(aff2axcodes(a)), "".join(aff2axcodes(b))
    directions = a[:3, :3] / sizes[0], b[:3, :3] / sizes[1]
    origins = a[:3, 3], b[:3, 3]
    found = []
    if axes[0] != axes[1]:
        found.append(f"orientation {axes[0]}, the image's {axes[1]}")
    elif not np.allclose(directions[0], directions[1], atol=1e-4):
        turned = np.degrees(np.arccos(np.clip((directions[0] * directions[1]).sum(0), -1, 1))).max()
        found.append(f"axes turned by {turned:.3g} degrees")
    if not np.allclose(sizes[0], sizes[1], rtol=1e-4):
        found.append(f"voxel size {_triple(sizes[0])} mm, the image's {_triple(sizes[1])}")
    if not np.allclose(origins[0], origins[1], atol=1e-3 * sizes[1].min()):
        found.append(f"origin {_triple(origins[0])} mm, the image's {_triple(origins[1])}")
    return ", ".join(found)


def _triple(values: NDArray[Any]) -> str:
    return f"({', '.join(f'{value:.5g}' for value in values)})"
