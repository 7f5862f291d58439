"""Checking the files of a case: they can be read, hold numbers, fit each other, and lie on one grid in space."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcurlora_ext.segmentation.cases import Case, check_exists

# How far apart the same voxel of image and label may lie, in voxels. Headers round to float32 or to four digits, which
# is 0.03 voxels over 512 of them; a label that is a tenth of a voxel off still is on the same voxels.
GRID_TOLERANCE = 0.1


def check_case(case: Case, declared: dict[int, str] | None) -> tuple[int, set[int]]:
    """Check the files of one case.

    Args:
        case: Its files.
        declared: Class names by label value; None where any whole numbers from 0 are classes.

    Returns:
        The image's channel count and the label's values.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read or does not hold what it should; or image and label differ in shape or grid.
    """
    image_file, image = _read(case.image)
    label_file, label = _read(case.label)
    if image.ndim not in (3, 4):
        vector = ", a NIfTI vector image" if image.ndim == 5 and image.shape[3] == 1 else ""
        raise ValueError(f"{case.image}: found {image.ndim} axes{vector}, expected 3, or 4 with channels last")
    if label.shape != image.shape[:3]:
        form = ", with a fourth axis of 1, which is not read" if label.shape == (*image.shape[:3], 1) else ""
        raise ValueError(
            f"{case.label}: found shape {label.shape}{form}, expected {image.shape[:3]} as in {case.image}"
        )
    _check_image(case.image, image)
    _check_label(case.label, label, declared, label_file)
    _check_grid(case, image_file, label_file)
    return image.shape[3] if image.ndim == 4 else 1, {int(value) for value in np.unique(label)}


def _read(path: Path) -> tuple[Any, NDArray[Any]]:
    """A NIfTI file and its voxels, with the header's scaling applied and the header as MONAI corrects it."""
    import nibabel as nib
    from monai.data.utils import correct_nifti_header_if_necessary

    check_exists(path)
    try:
        file = nib.load(path)
        voxels = np.asarray(file.dataobj)
        file = correct_nifti_header_if_necessary(file)
    except Exception as error:  # gzip, zlib, EOF and nibabel errors: no common base
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}), expected a complete NIfTI file"
        ) from error
    if voxels.dtype.kind not in "biuf":
        found = "colours (RGB)" if voxels.dtype.names else f"{voxels.dtype} numbers"
        raise ValueError(f"{path}: found voxels that are {found}, expected one real number each")
    if voxels.size == 0:
        raise ValueError(f"{path}: found shape {voxels.shape}, which is no voxel, expected a volume")
    return file, voxels


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


def _check_label(path: Path, label: NDArray[Any], declared: dict[int, str] | None, file: Any) -> None:
    expected = "whole numbers from 0" if declared is None else ", ".join(f"{v} ({n})" for v, n in declared.items())
    _check_finite(path, label, expected)
    values = np.unique(label)
    strange = [value for value in values if value != int(value) or value < 0]
    if declared is not None:
        strange = [value for value in values if value not in declared]
    if strange:
        found = ", ".join(f"{value:g} ({int((label == value).sum())} voxels)" for value in strange[:5])
        slope, intercept = file.dataobj.slope, file.dataobj.inter
        scaled = "" if (slope, intercept) == (1, 0) else f" after its header's scaling by {slope:g} and {intercept:g}"
        raise ValueError(f"{path}: found label values {found}{scaled}, expected {expected}")


def _check_grid(case: Case, image: Any, label: Any) -> None:
    """Raise ValueError unless the voxels of image and label lie at the same places, in mm."""
    for path, file in ((case.image, image), (case.label, label)):
        if not np.isfinite(file.affine).all() or np.linalg.det(file.affine[:3, :3]) == 0:
            matrix = file.affine[:3].tolist()
            raise ValueError(f"{path}: found the affine {matrix}, expected finite numbers and no voxel size of 0")
    corners = np.array([(*corner, 1) for corner in product(*((0, length - 1) for length in label.shape[:3]))])
    apart = float(np.linalg.norm((corners @ (label.affine - image.affine).T)[:, :3], axis=1).max())
    if apart > GRID_TOLERANCE * min(np.linalg.norm(image.affine[:3, :3], axis=0)):
        bare = label.header["sform_code"] == 0 and label.header["qform_code"] == 0
        headless = " (it has neither sform nor qform)" if bare else ""
        raise ValueError(
            f"{case.label}: found another affine than that of {case.image}{headless}: {_differences(label, image)}; "
            f"its voxels lie up to {apart:.3g} mm from the image's, expected the same grid; where they match all the "
            "same, save the label with the image's affine"
        )


def _differences(label: Any, image: Any) -> str:
    """What differs between two affines: orientation, directions, voxel sizes, origin."""
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import aff2axcodes

    a, b = label.affine, image.affine
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
