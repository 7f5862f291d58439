"""Image and label of a case: on one grid in space, of real numbers, with something to learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset

IMAGE, LABEL = "imagesTr/case_000.nii.gz", "labelsTr/case_000.nii.gz"
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])  # of the fixture's files


def save(root: Path, name: str, voxels: np.ndarray | None = None, affine: np.ndarray | None = AFFINE) -> None:
    """Write a file of the data set again with other voxels or another affine."""
    path = root / name
    nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj) if voxels is None else voxels, affine), path)


def voxels_of(root: Path, name: str) -> np.ndarray:
    return np.asarray(nib.load(root / name).dataobj)


def moved(millimetres: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += millimetres
    return affine


def turned(degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE


@pytest.mark.parametrize(
    ("affine", "difference"),
    [
        (np.diag([-2.0, -2, 2, 1]), "orientation LPS, the image's RAS"),
        (AFFINE[[1, 0, 2, 3]], "orientation ARS, the image's RAS"),
        (np.diag([2.0, 2, 2.5, 1]), "voxel size (2, 2, 2.5) mm, the image's (2, 2, 2)"),
        (moved(1.0), "origin (1, 0, 0) mm, the image's (0, 0, 0)"),
        (turned(5.0), "axes turned by 5 degrees"),
        (None, "(it has neither sform nor qform)"),
    ],
    ids=["mirrored", "other axis order", "voxel size", "moved", "turned", "no header"],
)
def test_a_label_on_another_grid_is_refused_and_both_files_are_named(
    affine: np.ndarray | None, difference: str, data: Path
) -> None:
    save(data, LABEL, affine=affine)
    with pytest.raises(ValueError, match="found another affine than that of") as raised:
        read_dataset(data)
    message = str(raised.value)
    assert message.startswith(str(data / LABEL))
    assert str(data / IMAGE) in message
    assert difference in message
    assert "\n" not in message


@pytest.mark.parametrize("affine", [moved(1e-3), turned(1e-3), np.diag([2.0, 2, 2.0001, 1])])
def test_rounding_of_a_header_is_no_other_grid(affine: np.ndarray, data: Path) -> None:
    """The label is put on the image's grid, so that resampling gives both the same voxels."""
    save(data, LABEL, affine=affine)
    (volume,) = load_volumes(read_dataset(data).train[:1], spacing=(1.5, 1.5, 1.5))
    assert volume.image.shape[1:] == volume.label.shape[1:]
    assert volume.truth.shape == (1, 18, 20, 16)


def test_a_turned_case_keeps_its_label_on_the_organ(data: Path) -> None:
    """The same orientation in both files is no error, whichever it is: MONAI turns both to RAS."""
    affine = np.diag([-2.0, -2, 2, 1])[[2, 0, 1, 3]]
    (straight,) = load_volumes(read_dataset(data).train[:1], None)
    for name in (IMAGE, LABEL):
        save(data, name, affine=affine)
    (volume,) = load_volumes(read_dataset(data).train[:1], None)
    assert volume.image.shape != straight.image.shape
    for one in (straight, volume):
        assert float(one.image[one.label == 2].mean()) > 1 > float(one.image[one.label == 0].mean())


def test_a_voxel_size_of_zero_is_named(data: Path) -> None:
    flat = np.diag([2.0, 0, 2, 1])
    for name in (IMAGE, LABEL):
        voxels, header = voxels_of(data, name), nib.load(data / name).header.copy()
        header.set_sform(flat, code=1)  # nib.save would refuse it, so the file is put together by hand
        header["pixdim"][2] = 1  # with another size here MONAI takes the qform in place of the sform
        header["vox_offset"], header["magic"] = 352, b"n+1"
        path = data / name
        path.unlink()
        path.with_suffix("").write_bytes(header.binaryblock + bytes(4) + voxels.tobytes("F"))
    with pytest.raises(ValueError, match=r"case_000\.nii: found the affine .*expected finite numbers"):
        read_dataset(data)


def holding(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """One voxel of another value."""

    def change(voxels: np.ndarray) -> np.ndarray:
        changed = voxels.astype(np.float64)
        changed[0, 0, 0] = value
        return changed

    return change


def coloured(voxels: np.ndarray) -> np.ndarray:
    colours = np.zeros(voxels.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"] = voxels
    return colours


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LABEL, holding(np.nan), "found 1 voxels that are NaN or infinite, expected 0 (background)"),
        (LABEL, holding(-np.inf), "found 1 voxels that are NaN or infinite, expected 0 (background)"),
        (LABEL, holding(-1), "found label values -1 (1 voxels), expected 0 (background)"),
        (LABEL, holding(0.999), "found label values 0.999 (1 voxels), expected 0 (background)"),
        (LABEL, coloured, "found voxels that are colours (RGB), expected one real number each"),
        (LABEL, lambda label: label.astype(np.complex64), "found voxels that are complex64 numbers"),
        (LABEL, lambda label: np.stack([label] * 2, -1), "found shape (18, 20, 16, 2), expected (18, 20, 16) as in"),
        (IMAGE, coloured, "found voxels that are colours (RGB), expected one real number each"),
        (IMAGE, lambda image: image.astype(np.complex128), "found voxels that are complex128 numbers"),
        (IMAGE, holding(1e39), "found 1 voxels beyond float32 (up to 1e+39), expected less than 3.4e38"),
        (IMAGE, lambda image: image.astype(np.float64) * 1e-60, "found 0.0 in every voxel, expected an image"),
        (IMAGE, lambda image: np.stack([image] * 2, -1)[..., None, :], "found 5 axes, a NIfTI vector image"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_voxels_that_are_no_numbers_to_learn_from_are_named(
    name: str, change: Callable[[np.ndarray], np.ndarray], message: str, data: Path
) -> None:
    save(data, name, change(voxels_of(data, name)))
    with pytest.raises(ValueError, match="expected") as raised:
        read_dataset(data)
    assert str(raised.value).startswith(f"{data / name}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_label_with_a_fourth_axis_of_1_is_read_as_one_without(data: Path) -> None:
    (plain,) = load_volumes(read_dataset(data).train[:1], (1.5, 1.5, 1.5))
    save(data, LABEL, voxels_of(data, LABEL)[..., None])
    (volume,) = load_volumes(read_dataset(data).train[:1], (1.5, 1.5, 1.5))
    assert torch.equal(plain.label, volume.label)
    assert torch.equal(plain.truth, volume.truth)


def test_the_scaling_of_a_header_is_named_where_it_makes_fractions(data: Path) -> None:
    file = nib.Nifti1Image(voxels_of(data, LABEL), AFFINE)
    file.header.set_slope_inter(0.25, 0.0)
    nib.save(file, data / LABEL)
    with pytest.raises(ValueError, match=r"found label values 0\.25 .* after its header's scaling by 0\.25 and 0"):
        read_dataset(data)


def test_a_scaling_to_whole_numbers_is_taken(data: Path) -> None:
    label = voxels_of(data, LABEL)
    file = nib.Nifti1Image(label * 2, AFFINE)
    file.header.set_slope_inter(0.5, 0.0)
    nib.save(file, data / LABEL)
    (volume,) = load_volumes(read_dataset(data).train[:1], None)
    assert torch.equal(torch.as_tensor(volume.truth[0]), torch.from_numpy(label).float())


def test_intensities_that_overflow_when_normalised_are_named(data: Path) -> None:
    image = voxels_of(data, IMAGE)
    save(data, IMAGE, np.where(image > image.mean(), 3e38, -3e38).astype(np.float32))
    with pytest.raises(ValueError, match=r"case_000\.nii\.gz: found intensities that cannot be normalised"):
        load_volumes(read_dataset(data).train[:1], None)


@pytest.mark.parametrize("declared", [True, False])
def test_a_data_set_without_foreground_is_refused(declared: bool, data: Path) -> None:
    for name in ("case_000", "case_001", "case_002"):
        save(data, f"labelsTr/{name}.nii.gz", np.zeros((18, 20, 16), np.uint8))
    if not declared:
        (data / "dataset.json").unlink()
    expected = r"expected 1 \(front\), 2 \(back\)" if declared else "expected values from 1"
    with pytest.raises(ValueError, match=rf"labelsTr: found no foreground voxel .* 3 training cases .*{expected}"):
        read_dataset(data)


def test_validation_without_foreground_is_a_warning(data: Path) -> None:
    for name in ("case_003", "case_004"):
        save(data, f"labelsTr/{name}.nii.gz", np.zeros((18, 20, 16), np.uint8))
    with pytest.warns(UserWarning, match=r"labelsTr: found no foreground voxel in the labels of 2 validation cases"):
        read_dataset(data)
