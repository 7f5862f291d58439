"""Scans that cannot be predicted, folders with other files, and other formats than NIfTI: nothing is half-done."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.prediction import PredictOptions, predict_scans

from .scans import SHAPE, blob, levels, oblique, save


def test_one_damaged_scan_does_not_stop_the_others(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "in" / f"{name}.nii.gz", blob())
    whole = (tmp_path / "in/b.nii.gz").read_bytes()
    (tmp_path / "in/b.nii.gz").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"1 of 3 scans are not predicted: .*b\.nii\.gz: cannot be read"):
        predict_scans(levels(), [tmp_path / "in"], out)
    assert sorted(path.name for path in out.iterdir()) == [
        "a.nii.gz", "c.nii.gz", "overlays", "prediction.json", "volumes.csv",
    ]  # fmt: skip
    assert [row["case"] for row in read_csv(out / "volumes.csv")] == ["a", "c"]


def sheared(degrees: float) -> np.ndarray:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 1] = 2 * np.tan(np.radians(degrees))
    return affine


def test_scans_that_cannot_be_predicted_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    broken = blob()
    broken[3, 3, 3] = np.nan
    (tmp_path / "text.nii").write_text("no image")
    (tmp_path / "text.nii.gz").write_text("no image")
    cases: list[tuple[Path, str]] = [
        (tmp_path / "text.nii", "cannot be read"),
        (tmp_path / "text.nii.gz", "cannot be read"),
        (save(tmp_path / "nan.nii", broken), "found 1 voxels that are NaN"),
        (save(tmp_path / "flat.nii", np.zeros(SHAPE, np.int16)), "found 0 in every voxel, expected an image"),
        (save(tmp_path / "plane.nii", blob()[:, :, 7]), "found 2 axes, expected 3"),
        (save(tmp_path / "vector.nii", np.ones((*SHAPE, 1, 2), np.float32)), "found 5 axes|found 4 axes"),
        (save(tmp_path / "two.nii", np.stack([blob()] * 2, -1)), "found 2 channels of 18x22x15 voxels, expected 1 as"),
        (save(tmp_path / "sheared.nii", blob(), sheared(5)), "not orthonormal: two of its axes are at 85 degrees"),
        (save(tmp_path / "complex.nii", blob().astype(np.complex64)), "found voxels that are complex64 numbers"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            predict_scans(levels(), [path], tmp_path / "out")
        assert str(raised.value).startswith(f"{path}: ")
        assert "expected" in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_wrong_inputs_and_outputs_are_named_before_anything_is_predicted(tmp_path: Path) -> None:
    scan = save(tmp_path / "in" / "a.nii.gz", blob())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.dcm").touch()
    (tmp_path / "file").touch()
    save(tmp_path / "double" / "a.nii", blob())
    save(tmp_path / "double" / "a.nii.gz", blob())
    out = tmp_path / "out"
    cases: list[tuple[list[Path], Path, type[Exception], str]] = [
        ([], out, ValueError, "input: found none"),
        ([tmp_path / "nowhere"], out, FileNotFoundError, "nowhere: no such file or folder"),
        ([tmp_path / "file"], out, ValueError, "file: found a file of another kind, expected a volume"),
        ([tmp_path / "empty"], out, ValueError, r"found no scan in this folder, which holds 1 \.dcm"),
        ([tmp_path / "double"], out, ValueError, "has the name of .*a.nii, expected one scan for each name"),
        ([scan], tmp_path / "file", ValueError, "file: found a file, expected a folder or nothing"),
        ([scan], tmp_path / "in", ValueError, "would replace the scan, expected another folder"),
    ]
    for inputs, folder, error, message in cases:
        with pytest.raises(error, match=message):
            predict_scans(levels(), inputs, folder, PredictOptions(overwrite=True))
    with pytest.raises(ValueError, match=r"overlap: found 1\.0, expected a number from 0 to below 1"):
        predict_scans(levels(), [scan], out, PredictOptions(overlap=1.0))
    assert not out.exists()


def test_volumes_of_other_formats_in_a_folder_are_a_warning(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.nii", blob())
    (tmp_path / "in" / "b.mgz").touch()
    with pytest.warns(UserWarning, match=r"1 volumes are not read \(b\.mgz, \.\.\.\)"):
        predict_scans(levels(), [tmp_path / "in"], tmp_path / "out", PredictOptions(overlays=False))


def test_channels_that_are_taken_for_scans_are_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        save(tmp_path / "in" / f"{name}.nii", blob())
    options = PredictOptions(overlays=False)
    with pytest.warns(UserWarning, match=r"in: found the numbers _0000 to _0001 .*each of the 4 files is a scan"):
        predict_scans(levels(), [tmp_path / "in"], tmp_path / "out", options)
    recwarn.clear()
    (tmp_path / "in" / "b_0001.nii").unlink()  # then they number scans
    predict_scans(levels(), [tmp_path / "in"], tmp_path / "out", options)
    save(tmp_path / "others" / "a_0000.nii", blob())  # one channel, in nnU-Net's form
    predict_scans(levels(), [tmp_path / "others"], tmp_path / "out2", options)
    assert not [entry for entry in recwarn if "channel" in str(entry.message)]


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_format_without_its_reader_says_what_to_install(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcurlora_ext.segmentation.dataset import formats

    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(ValueError, match=rf"the package that reads \{suffix} is not installed; expected itk"):
        predict_scans(levels(), [tmp_path], tmp_path / "out")


def test_nrrd_through_monais_reader_gets_the_labels_of_the_same_nifti(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI's own code turns the header's axes; only the package that parses the file is replaced."""
    from monai.data import image_reader

    affine = oblique()
    voxels = blob(affine=affine)
    flip = np.diag([-1.0, -1.0, 1.0])  # NRRD's axes point left and to the back
    header = {
        "space": "left-posterior-superior", "sizes": np.array(SHAPE),
        "space directions": (flip @ affine[:3, :3]).T, "space origin": flip @ affine[:3, 3],
    }  # fmt: skip
    package: Any = ModuleType("nrrd")
    package.__spec__ = ModuleSpec("nrrd", None)
    package.read = lambda name, index_order: (voxels, dict(header))
    monkeypatch.setitem(sys.modules, "nrrd", package)
    monkeypatch.setattr(image_reader, "nrrd", package)
    monkeypatch.setattr(image_reader, "has_nrrd", True)
    (tmp_path / "a.nrrd").touch()
    save(tmp_path / "b.nii.gz", voxels, affine)
    predict_scans(levels(), [tmp_path], tmp_path / "out", PredictOptions(overlays=False))
    a, b = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in "ab")
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
    assert len(np.unique(np.asarray(a.dataobj))) == 3


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_formats_get_the_labels_of_the_same_nifti(suffix: str, tmp_path: Path) -> None:
    itk = pytest.importorskip("itk")
    affine = oblique()
    voxels = blob(affine=affine)
    image = itk.image_from_array(np.ascontiguousarray(voxels.T))
    flip = np.diag([-1.0, -1.0, 1.0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetOrigin(flip @ affine[:3, 3])
    image.SetDirection(itk.matrix_from_array(flip @ affine[:3, :3] / spacing))
    itk.imwrite(image, str(tmp_path / f"a{suffix}"))
    save(tmp_path / "b.nii.gz", voxels, affine)
    out = tmp_path / "out"
    predict_scans(levels(), [tmp_path], out, PredictOptions(overlays=False))
    a, b = (nib.load(out / f"{name}.nii.gz") for name in "ab")
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
