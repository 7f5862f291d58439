"""Label maps of new scans: on each scan's own grid, alike however its voxels are stored, and not mixed with others."""

from __future__ import annotations

import itertools
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import inv_ornt_aff
from torch import Tensor

from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.prediction import PredictOptions, predict_image, predict_scans
from tcurlora_ext.segmentation.prediction import predicting as prediction
from tcurlora_ext.segmentation.prediction.predictor import load_predictor
from tcurlora_ext.segmentation.prediction.scans import read_scan

from .scans import SHAPE, blob, levels, noise, oblique, save


def test_flipped_and_permuted_copies_get_the_same_labels(finished_run: Path, tmp_path: Path) -> None:
    """All 48 orders of the voxels, by a network that does not treat axes and directions alike."""
    predictor = load_predictor(finished_run)
    image = nib.Nifti1Image(noise() + blob() / 500, oblique())
    nib.save(image, tmp_path / "scan.nii")
    original = predict_image(predictor, read_scan(tmp_path / "scan.nii", 1)).labels
    assert len(np.unique(original)) > 1
    count = 0
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            ornt = np.array(list(zip(order, signs, strict=True)), dtype=float)
            copy = image.as_reoriented(ornt)
            assert np.allclose(copy.affine, image.affine @ inv_ornt_aff(ornt, SHAPE))
            nib.save(copy, tmp_path / "copy.nii")
            found = predict_image(predictor, read_scan(tmp_path / "copy.nii", 1)).labels
            expected = np.asarray(nib.Nifti1Image(original, image.affine).as_reoriented(ornt).dataobj)
            np.testing.assert_array_equal(found, expected)
            count += 1
    assert count == 48


@pytest.mark.parametrize("spacing", [0.9, 1.1])
def test_a_copy_resampled_by_ten_percent_gets_the_same_structures(spacing: float, tmp_path: Path) -> None:
    from nibabel.processing import resample_from_to, resample_to_output

    image = nib.Nifti1Image(blob((54, 66, 46), np.diag([0.6, 0.6, 0.6, 1.0])), np.eye(4))
    copy = resample_to_output(image, (spacing,) * 3, order=1, mode="nearest")
    voxels = np.asarray(image.dataobj)
    predictor = levels((1.0, 1.0, 1.0), centres=[(level - voxels.mean()) / voxels.std() for level in (0, 1000, 2000)])
    found = []
    for name, one in (("scan", image), ("copy", copy)):
        nib.save(one, tmp_path / f"{name}.nii")
        labels = predict_image(predictor, read_scan(tmp_path / f"{name}.nii", 1)).labels
        assert labels.shape == one.shape
        found.append(nib.Nifti1Image(labels, one.affine))
    back = np.asarray(resample_from_to(found[1], found[0], order=0).dataobj)
    original = np.asarray(found[0].dataobj)
    for value in (2, 7):
        a, b = original == value, back == value
        assert a.sum() > 500
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95


def test_a_label_map_has_grid_header_and_name_of_its_scan_and_the_labels_values(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = b"a scanner"
    header["cal_max"] = 900
    image = nib.Nifti1Image(blob(affine=oblique()).astype(np.int16), oblique(), header)
    image.set_qform(oblique(), code=1)
    image.set_sform(oblique(), code=4)
    image.header.set_slope_inter(2.0, -100.0)
    path = tmp_path / "in" / "some.case.nii.gz"
    path.parent.mkdir()
    nib.save(image, path)
    (row,) = predict_scans(levels(), [path], tmp_path / "out")
    scan, found = nib.load(path), nib.load(tmp_path / "out" / "some.case.nii.gz")
    labels = np.asarray(found.dataobj)
    assert labels.dtype == np.uint8
    assert found.get_data_dtype() == np.uint8
    assert set(np.unique(labels)) == {0, 2, 7}
    np.testing.assert_array_equal(found.affine, scan.affine)
    voxels = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_max", "vox_offset"}
    for key in set(scan.header) - voxels:
        np.testing.assert_array_equal(found.header[key], scan.header[key], err_msg=key)
    volume = abs(np.linalg.det(scan.affine[:3, :3]))
    assert row == {
        "case": "some.case", "shell mm3": pytest.approx((labels == 2).sum() * volume, abs=1e-2),
        "core mm3": pytest.approx((labels == 7).sum() * volume, abs=1e-2),
    }  # fmt: skip
    assert [list(line) for line in read_csv(tmp_path / "out/volumes.csv")] == [["case", "shell mm3", "core mm3"]]
    assert (tmp_path / "out/overlays/some.case.png").read_bytes().startswith(b"\x89PNG")


def test_nifti_2_a_fourth_axis_of_one_and_several_channels(tmp_path: Path) -> None:
    voxels = blob()
    nib.save(nib.Nifti2Image(voxels, np.eye(4)), tmp_path / "second.nii")
    save(tmp_path / "one.nii", voxels[..., None])
    save(tmp_path / "two.nii", np.stack([voxels, noise()], -1))
    out = tmp_path / "out"
    predict_scans(levels(), [tmp_path / "second.nii", tmp_path / "one.nii"], out, PredictOptions(overlays=False))
    assert isinstance(nib.load(out / "second.nii"), nib.Nifti2Image)
    predict_scans(levels(channels=2), [tmp_path / "two.nii"], tmp_path / "two", PredictOptions(overlays=False))
    assert nib.load(out / "one.nii").shape == nib.load(tmp_path / "two/two.nii").shape == SHAPE
    first, second = (np.asarray(nib.load(path).dataobj) for path in (out / "one.nii", tmp_path / "two/two.nii"))
    np.testing.assert_array_equal(first, second)  # the levels are those of the first channel


def test_probabilities_are_those_of_the_labels_and_the_mean_over_seeds(finished_run: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", noise(), oblique())
    options = PredictOptions(probabilities=True, overlays=False)
    each = []
    for name, seeds in (("first", [0]), ("second", "1"), ("both", "all")):
        predictor = load_predictor(finished_run, seeds=seeds)
        predict_scans(predictor, [path], tmp_path / name, options)
        file = nib.load(tmp_path / name / "probabilities/scan.nii.gz")
        assert file.get_data_dtype() == np.float32
        each.append(np.asarray(file.dataobj))
        assert each[-1].shape == (*SHAPE, 3)
        np.testing.assert_allclose(each[-1].sum(-1), 1, atol=1e-5)
        labels = np.asarray(nib.load(tmp_path / name / "scan.nii.gz").dataobj)
        np.testing.assert_array_equal(labels, each[-1].argmax(-1))
    assert len(predictor.models) == 2
    np.testing.assert_allclose(each[2], (each[0] + each[1]) / 2, atol=1e-6)
    assert not np.allclose(each[0], each[1], atol=1e-4)


def test_what_is_there_is_skipped_unless_overwritten(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(tmp_path / "in" / f"{name}.nii.gz", blob())
    (tmp_path / "in" / "notes.txt").write_text("no scan")
    out = tmp_path / "out"
    predict_scans(levels(), [tmp_path / "in"], out)
    assert [row["case"] for row in read_csv(out / "volumes.csv")] == ["a", "b"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    (out / "b.nii.gz").unlink()
    predict_scans(levels(), [tmp_path / "in"], out)
    after = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert [path.name for path in before if before[path] != after[path]] == ["b.nii.gz"]
    predict_scans(levels(), [tmp_path / "in" / "a.nii.gz"], out, PredictOptions(overwrite=True))
    assert (out / "a.nii.gz").stat().st_mtime_ns > after[out / "a.nii.gz"]
    assert len(read_csv(out / "volumes.csv")) == 2
    # probabilities are asked for later: they are made for a scan that has a label map
    predict_scans(levels(), [tmp_path / "in"], out, PredictOptions(probabilities=True))
    assert sorted(path.name for path in (out / "probabilities").iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_label_maps_made_otherwise_do_not_mix(tmp_path: Path) -> None:
    a, b = (save(tmp_path / f"{name}.nii", blob()) for name in "ab")
    out = tmp_path / "out"
    predict_scans(levels(), [a, b], out)
    with pytest.raises(
        ValueError, match=r"made with another overlap than now; expected another folder, or --overwrite"
    ):
        predict_scans(levels(), [a], out, PredictOptions(overlap=0.5))
    with pytest.raises(ValueError, match="for all scans in it \\(b is not among these\\)"):
        predict_scans(levels(), [a], out, PredictOptions(overlap=0.5, overwrite=True))
    other = replace(levels(), labels={0: "background", 1: "x", 2: "y"}, origin={"base_sha256": "of others"})
    predict_scans(other, [a, b], out, PredictOptions(overlap=0.5, overwrite=True))
    assert read_json(out / "prediction.json") == {"source": "levels", "base_sha256": "of others", "overlap": 0.5}
    assert [list(row) for row in read_csv(out / "volumes.csv")] == [["case", "x mm3", "y mm3"]] * 2
    (out / "prediction.json").unlink()
    with pytest.raises(ValueError, match=r"found a.nii but no prediction.json"):
        predict_scans(levels(), [a], out)


def test_nothing_is_kept_from_one_scan_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 scans, at most the one before is alive when the next is read, and memory stays flat."""
    from monai.data.meta_tensor import MetaTensor

    read: list[weakref.ref[Any]] = []
    predicted: list[weakref.ref[Any]] = []
    alive, held = [], []
    one = predict_image

    def fake(path: Path, channels: int, others: tuple[Path, ...]) -> Tensor:
        alive.append(sum(ref() is not None for ref in (*read, *predicted)))
        held.append(tracemalloc.get_traced_memory()[0])
        image = MetaTensor(torch.from_numpy(blob())[None], affine=torch.eye(4, dtype=torch.float64))
        read.append(weakref.ref(image))
        return image

    def watched(*arguments: Any, **options: Any) -> prediction.Prediction:
        found = one(*arguments, **options)
        predicted.append(weakref.ref(found))
        return found

    monkeypatch.setattr(prediction, "read_scan", fake)
    monkeypatch.setattr(prediction, "predict_image", watched)
    monkeypatch.setattr(prediction, "write_volume", lambda *content: None)
    for index in range(50):
        (tmp_path / f"{index:02d}.nii").touch()
    tracemalloc.start()
    rows = predict_scans(levels(), [tmp_path], tmp_path / "out", PredictOptions(probabilities=True, overlays=False))
    tracemalloc.stop()
    assert len(rows) == len(read) == 50
    assert max(alive) == 0
    growth = held[-1] - held[10]
    assert growth < 40 * 10_000  # bytes: a row, two paths and what warnings leave of each; an image alone has 23,760


def test_progress_names_scans_and_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tcurlora_ext.io.table import terminal
    from tcurlora_ext.segmentation.terminal import Display

    path = save(tmp_path / "a.nii", blob())
    for _ in range(2):
        predict_scans(levels(), [path], tmp_path / "out", PredictOptions(overlays=False), Display(terminal()))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/1] a.nii: ")
    assert "shell " in first
    assert " mm³, core " in first
    assert second == "[1/1] a.nii: is there, skipped"
