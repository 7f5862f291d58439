"""Which cases there are: folders, the list "training" of dataset.json, the lists of splits.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcurlora_ext.segmentation.dataset import formats, read_dataset

LABELS = {"0": "background", "1": "front", "2": "back"}


def write(root: Path, name: str, content: Any) -> None:
    (root / name).write_text(json.dumps(content))


def describe(root: Path, training: Any, **more: Any) -> None:
    write(root, "dataset.json", {"labels": LABELS, "training": training, **more})


def pair(image: str, label: str | None = None) -> dict[str, str]:
    return {"image": f"./imagesTr/{image}.nii.gz", "label": f"./labelsTr/{label or image}.nii.gz"}


def rename(root: Path, old: str, new: str) -> None:
    (root / old).rename(root / new)


def without_splits(root: Path) -> None:
    (root / "splits.json").unlink()


def test_the_training_list_says_which_cases_there_are(data: Path) -> None:
    without_splits(data)
    describe(data, [pair(name) for name in ("case_004", "case_001", "case_002")])
    found = read_dataset(data)
    assert sorted(case.name for case in (*found.train, *found.val)) == ["case_001", "case_002", "case_004"]


def test_the_training_list_pairs_labels_of_other_names_in_other_folders(data: Path) -> None:
    (data / "drawn").mkdir()
    pairs = []
    for index in range(5):
        rename(data, f"labelsTr/case_00{index}.nii.gz", f"drawn/{index}_seg.nii.gz")
        pairs.append({"image": f"imagesTr/case_00{index}.nii.gz", "label": f"drawn/{index}_seg.nii.gz"})
    (data / "labelsTr").rmdir()
    describe(data, pairs)
    found = read_dataset(data)
    assert [(case.name, case.label.name) for case in found.val] == [
        ("case_003", "3_seg.nii.gz"), ("case_004", "4_seg.nii.gz"),
    ]  # fmt: skip


FORM = 'expected {"image": "./imagesTr/NAME.nii.gz", "label": "./labelsTr/NAME.nii.gz"}'


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ([], "found [] as 'training', expected a list of"),
        ({"case_000": pair("case_000")}, "as 'training', expected a list of"),
        (["./imagesTr/case_000.nii.gz"], f"entry 0 of 'training' is './imagesTr/case_000.nii.gz'; {FORM}"),
        ([pair("case_000"), {"image": "./imagesTr/case_001.nii.gz"}], "entry 1 of 'training' is {'image': "),
        ([{"image": "t1.nii.gz", "label": ["x.nii.gz", "y.nii.gz"]}], f"several files as its label; {FORM}"),
        ([{"image": ["t1.nii.gz", 2], "label": "x.nii.gz"}], f"'label': 'x.nii.gz'}}; {FORM}, or a list of files"),
        ([{**pair("case_000"), "fold": "one"}], "entry 0 of 'training' has the fold 'one', expected a whole number"),
        ([{"image": "a.mgz", "label": "a.nii.gz"}], "names a.mgz, expected a volume (.nii.gz, .nii, .mha, .nrrd)"),
        ([pair("case_000"), pair("case_000")], "expected each name once"),
        ([pair("case_000"), pair("case_001")], "its list 'training' has no case 'case_002', which"),
        ([pair(f"case_00{n}", "gone" if n == 1 else None) for n in range(5)], "gone.nii.gz: no such file; expected a"),
    ],
)
def test_other_forms_of_the_training_list_are_named(training: Any, message: str, data: Path) -> None:
    describe(data, training)
    with pytest.raises((ValueError, FileNotFoundError), match=r"expected|which") as raised:
        read_dataset(data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


FOLDS = {"fold_0": {"train": ["000"], "val": ["001"]}, "fold_1": {"train": ["002"], "val": ["003"]}}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([{"train": ["case_000"], "val": ["case_001"]}], "found a list of 1 objects (nnU-Net's form of folds)"),
        (["case_000"], "found a list, expected an object with lists"),
        ({}, "found no list 'train', expected one of those in"),
        ({"val": ["case_000"], "test": ["case_001"]}, "found no list 'train', expected one of val, test"),
        ({"few": {"a": ["case_000"]}, "val": ["case_001"]}, "found no list 'train', expected one of few/a, val"),
        (FOLDS, "found the list 'train' as fold_0/train, fold_1/train, expected one of these full names"),
        ({"train": "case_000", "val": ["case_001"]}, "found 'case_000' as 'train', expected a list of names"),
        ({"train": [pair("case_000")], "val": ["case_001"]}, "list 'train' holds {'image': "),
        ({"train": ["case_000", "000.nii.gz", "case_000.nii.gz"], "val": ["case_001"]}, "holds 1 cases twice"),
    ],
)
def test_other_forms_of_splits_are_named(splits: Any, message: str, data: Path) -> None:
    write(data, "splits.json", splits)
    with pytest.raises(ValueError, match=r"splits\.json") as raised:
        read_dataset(data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_folds_are_chosen_by_their_full_names(data: Path) -> None:
    write(data, "splits.json", FOLDS)
    found = read_dataset(data, train_list="fold_1/train", val_list="fold_1/val")
    assert [case.name for case in (*found.train, *found.val)] == ["case_002", "case_003"]
    assert (
        found.division
        == "1 training and 1 validation cases, by the lists 'fold_1/train' and 'fold_1/val' of splits.json"
    )
    (data / "splits.json").unlink()
    drawn = read_dataset(data, seed=3).division
    assert drawn == "4 training and 1 validation cases, by a random draw with data-seed 3"


def test_a_list_may_name_files(data: Path) -> None:
    write(data, "splits.json", {"train": ["case_000.nii.gz"], "val": ["imagesTr/case_001.nii.gz"]})
    found = read_dataset(data)
    assert [case.name for case in (*found.train, *found.val)] == ["case_000", "case_001"]


@pytest.mark.parametrize("lists", [{"train_list": "few"}, {"val_list": "held_out"}])
def test_a_list_without_splits_is_an_error(lists: dict[str, str], data: Path) -> None:
    without_splits(data)
    with pytest.raises(
        FileNotFoundError, match=r"splits\.json: no such file; expected it to hold the list '(few|held)"
    ):
        read_dataset(data, **lists)


def test_a_fraction_beside_splits_is_an_error(data: Path) -> None:
    with pytest.raises(ValueError, match=r"val-fraction: found 0\.2 beside .*splits\.json, whose lists say"):
        read_dataset(data, val_fraction=0.2)
    without_splits(data)
    read_dataset(data, val_fraction=0.2)


def test_a_label_of_two_images_is_refused_in_the_training_list(data: Path) -> None:
    other = "labelsTr/../labelsTr/case_000.nii.gz"
    describe(data, [pair("case_000"), {"image": "imagesTr/case_001.nii.gz", "label": other}])
    with pytest.raises(ValueError, match=r"json: the label .*case_000.* belongs to .*case_000.* and to .*case_001"):
        read_dataset(data)


@pytest.mark.parametrize("kind", ["label", "image"])
def test_a_file_of_two_cases_is_refused_where_names_pair_them(kind: str, data: Path) -> None:
    """A name also finds the file whose name ends in it: "000" finds case_000, which belongs to case_000 already."""
    if kind == "image":
        without_splits(data)
    else:
        write(data, "splits.json", {"train": ["case_000", "case_001"], "val": ["000"]})
    folder = data / {"label": "imagesTr", "image": "labelsTr"}[kind]
    shutil.copy(folder / "case_000.nii.gz", folder / "000.nii.gz")
    with pytest.raises(ValueError, match=rf"the {kind} \S*case_000\.nii\.gz belongs to .* and to .*, expected one"):
        read_dataset(data)


def all_named(root: Path, suffix: str) -> None:
    for path in [*root.glob("*Tr/*.nii.gz")]:
        path.rename(path.with_name(path.name.replace(".nii.gz", suffix)))


def one_folder_a_case(root: Path) -> None:
    for path in [*root.glob("*Tr/*.nii.gz")]:
        folder = path.parent / path.name.removesuffix(".nii.gz")
        folder.mkdir()
        path.rename(folder / "volume.nii.gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: all_named(root, ".mgz"), "found 0 labels (the folder holds 5 .mgz), expected at least 2"),
        (lambda root: all_named(root, ".mha"), ".mha: the package that reads .mha is not installed; expected itk"),
        (lambda root: all_named(root, ".nrrd"), "(pip install itk), or the volume as NIfTI"),
        (lambda root: all_named(root, ".NII.GZ"), "found 0 labels (the folder holds 5 .NII.GZ)"),
        (one_folder_a_case, "found 0 labels (the folder holds 5 folders)"),
        (
            lambda root: rename(root, "imagesTr/case_003.nii.gz", "imagesTr/case_003_0000.nii.gz"),
            "found case_003_0000.nii.gz, nnU-Net's form with a number for the channel",
        ),
        (
            lambda root: rename(root, "imagesTr/case_003.nii.gz", "imagesTr/case_003.mgz"),
            "found case_003.mgz, expected a volume (.nii.gz, .nii, .mha, .nrrd)",
        ),
        (
            lambda root: rename(root, "imagesTr/case_003.nii.gz", "imagesTr/case_004.nii"),
            "found case_004.nii and case_004.nii.gz, expected one file for each case",
        ),
    ],
)
def test_files_that_are_not_read_are_named(
    change: Callable[[Path], None], message: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda package: None)  # as where neither itk nor pynrrd is installed
    without_splits(data)
    change(data)
    with pytest.raises((ValueError, FileNotFoundError), match="Tr") as raised:
        read_dataset(data)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def one_in_another_format(root: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        rename(root, f"{part}/case_003.nii.gz", f"{part}/case_003.mgz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "labelsTr/case_003.nii.gz").unlink(), "1 images have no label and are not used"),
        (one_in_another_format, r"labelsTr: 1 volumes are not read \(case_003\.mgz, \.\.\.\), expected each"),
        (lambda root: write(root, "splits_final.json", [{}]), r"splits_final\.json: not read, the cases are split at"),
        (
            lambda root: describe(root, [{**pair(f"case_00{n}"), "fold": n % 2} for n in range(4)]),
            r"dataset\.json: the keys 'fold' are not read, the cases are split at random; expected --fold N",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*volumes are not read")  # the case of a format has one warning for each folder
def test_what_a_random_split_leaves_out_is_a_warning(
    change: Callable[[Path], None], message: str, data: Path
) -> None:  # fmt: skip
    without_splits(data)
    change(data)
    with pytest.warns(UserWarning, match=message):
        found = read_dataset(data)
    assert len(found.train) + len(found.val) == (5 if (data / "splits_final.json").exists() else 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([LABELS], "found a list, expected an object with labels and training"),
        (
            {"labels": {"background": 0, "front": 1, "ignore": [2, 3]}},
            "found [2, 3] as the label 'ignore', expected one whole number above 0",
        ),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "found the region 'whole' of several values (nnU-Net)"),
        ({"labels": ["background", "front"]}, "found labels ['background', 'front'], expected"),
    ],
)
def test_other_forms_of_dataset_json_are_named(content: Any, message: str, data: Path) -> None:
    write(data, "dataset.json", content)
    with pytest.raises(ValueError, match=r"dataset\.json") as raised:
        read_dataset(data)
    assert message in str(raised.value)
