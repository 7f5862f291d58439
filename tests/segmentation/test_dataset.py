"""Bad input: one error that names the file, what was found and what was expected; nothing written, nothing lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    nifti = nib.load(path)
    nib.save(nib.Nifti1Image(edit(np.asarray(nifti.dataobj)), nifti.affine), path)


def edit_splits(root: Path, **lists: object) -> None:
    path = root / "splits.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **lists}))


def other_shape(root: Path) -> tuple[str, ...]:
    change(root / "labelsTr/case_004.nii.gz", lambda label: label[:, :, :-1])
    return "labelsTr/case_004.nii.gz", "(18, 20, 15)", "expected (18, 20, 16)"


def unknown_value(root: Path) -> tuple[str, ...]:
    def edit(label: np.ndarray) -> np.ndarray:
        label = label.copy()
        label[0, 0, :3] = 7
        return label

    change(root / "labelsTr/case_001.nii.gz", edit)
    return "labelsTr/case_001.nii.gz", "found label values 7 (3 voxels)", "expected 0 (background), 1 (front), 2 (back)"


def fractional_value(root: Path) -> tuple[str, ...]:
    change(root / "labelsTr/case_001.nii.gz", lambda label: label.astype(np.float32) * 0.5)
    return "labelsTr/case_001.nii.gz", "0.5", "expected 0 (background)"


def truncated(root: Path) -> tuple[str, ...]:
    path = root / "imagesTr/case_002.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "imagesTr/case_002.nii.gz", "cannot be read", "expected a complete NIfTI file"


def not_nifti(root: Path) -> tuple[str, ...]:
    (root / "labelsTr/case_002.nii.gz").write_text("not a volume")
    return "labelsTr/case_002.nii.gz", "cannot be read", "expected a complete NIfTI file"


def missing_image(root: Path) -> tuple[str, ...]:
    (root / "imagesTr/case_003.nii.gz").unlink()
    return "imagesTr/case_003.nii.gz", "no such file", "list 'val'"


def missing_label(root: Path) -> tuple[str, ...]:
    (root / "labelsTr/case_000.nii.gz").unlink()
    return "labelsTr/case_000.nii.gz", "no such file", "list 'train'"


def not_finite(root: Path) -> tuple[str, ...]:
    change(root / "imagesTr/case_000.nii.gz", lambda image: np.where(image > image.max() - 1e-6, np.nan, image))
    return "imagesTr/case_000.nii.gz", "found 1 voxels that are NaN", "expected finite"


def flat(root: Path) -> tuple[str, ...]:
    change(root / "imagesTr/case_000.nii.gz", np.zeros_like)
    return "imagesTr/case_000.nii.gz", "found 0.0 in every voxel", "expected an image"


def empty_split(root: Path) -> tuple[str, ...]:
    edit_splits(root, val=[])
    return "splits.json", "list 'val' is empty", "expected at least one case"


def no_split(root: Path) -> tuple[str, ...]:
    (root / "splits.json").write_text('{"train": ["case_000"]}')
    return "splits.json", "found no list 'val'", "expected one of train"


def overlap(root: Path) -> tuple[str, ...]:
    edit_splits(root, val=["case_000", "case_004"])
    return str(root), "found case_000 in both lists", "expected training and validation apart"


def broken_json(root: Path) -> tuple[str, ...]:
    (root / "splits.json").write_text('{"train": [')
    return "splits.json", "not valid JSON", ""


def gap_in_labels(root: Path) -> tuple[str, ...]:
    (root / "dataset.json").write_text('{"labels": {"0": "background", "2": "back"}}')
    return "dataset.json", "found the label values [0, 2]", "expected 0, 1, ..."


def five_axes(root: Path) -> tuple[str, ...]:
    change(root / "imagesTr/case_000.nii.gz", lambda image: np.stack([image] * 2, -1)[..., None, :])
    return "imagesTr/case_000.nii.gz", "found 5 axes", "expected 3"


def no_folder(root: Path) -> tuple[str, ...]:
    (root / "imagesTr").rename(root / "pictures")
    return str(root), "found neither imagesTr/ nor images/", "expected one of them"


DAMAGES = [
    other_shape, unknown_value, fractional_value, truncated, not_nifti, missing_image, missing_label, not_finite, flat,
    empty_split, no_split, overlap, broken_json, gap_in_labels, five_axes, no_folder,
]  # fmt: skip


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_input_is_named_and_nothing_is_written(
    damage: Callable[[Path], tuple[str, ...]],
    data: Path,
    tmp_path: Path,
    settings: Callable[..., FinetuneSettings],
) -> None:
    expected = damage(data)
    before = digest(data)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        finetune(settings(data=data), tmp_path / "run")
    for part in expected:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
    assert digest(data) == before


def test_the_undamaged_copy_is_read(data: Path) -> None:
    found = read_dataset(data)
    assert [case.name for case in found.train] == ["case_000", "case_001", "case_002"]
    assert found.classes == ("front", "back")
    assert read_dataset(data, train_list="one").train[0].name == "case_000"


def test_without_declared_classes_validation_may_not_go_beyond_training(data: Path) -> None:
    (data / "dataset.json").unlink()
    assert read_dataset(data).labels == {0: "background", 1: "label 1", 2: "label 2"}
    change(data / "labelsTr/case_004.nii.gz", lambda label: np.where(label == 2, 3, label).astype(np.uint8))
    with pytest.raises(ValueError, match=r"case_004\.nii\.gz: found label values \[3\], expected \[0, 1, 2\]"):
        read_dataset(data)


def test_a_random_split_is_seeded_and_disjoint(data: Path) -> None:
    (data / "splits.json").unlink()
    first, again, other = (read_dataset(data, val_fraction=0.4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first.val) == 2
    assert not {case.name for case in first.val} & {case.name for case in first.train}
    assert {tuple(case.name for case in found.val) for found in (first, other)} != {
        tuple(case.name for case in first.val)
    }


def test_ids_find_their_file_by_the_end_of_its_name(data: Path) -> None:
    edit_splits(data, train=["000"], val=["004"])
    found = read_dataset(data)
    assert found.train[0].image.name == found.train[0].label.name == "case_000.nii.gz"


def test_volumes_are_normalised_and_truth_keeps_its_grid(data: Path) -> None:
    (volume,) = load_volumes(read_dataset(data).val[:1], spacing=(4.0, 4.0, 4.0))
    assert abs(float(volume.image.mean())) < 1e-4
    assert abs(float(volume.image.std()) - 1) < 1e-2
    assert volume.truth.shape == (1, 18, 20, 16)
    assert volume.spacing == (2.0, 2.0, 2.0)
    assert max(volume.image.shape[1:]) <= 11
