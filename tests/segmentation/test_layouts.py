"""Every layout of a data set gives the same cases, channels and labels; what does not fit one is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.losses.dice import DiceCELoss
from typer.testing import CliRunner

from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.dataset import IGNORED, Volume, load_volumes, read_dataset
from tcurlora_ext.segmentation.metrics.evaluation import one_hot_pair
from tcurlora_ext.segmentation.prediction import PredictOptions, predict_scans
from tcurlora_ext.segmentation.prediction.predictor import load_predictor
from tcurlora_ext.segmentation.prediction.scans import find_scans, read_scan
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.scoring.scorecard import EvaluateSettings, evaluate
from tcurlora_ext.segmentation.training.losses import IgnoringLoss

NAMES = [f"case_{index:03d}" for index in range(5)]
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SIZES = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 1, "num_heads": 2, "features": 4}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def as_nnunet(source: Path, root: Path, channels: int = 2, ending: str = ".nii.gz") -> Path:
    """The data set in nnU-Net's layout; channel k is the image, k added to it."""
    for name in NAMES:
        image, label = (voxels(source / part / f"{name}.nii.gz") for part in ("imagesTr", "labelsTr"))
        for channel in range(channels):
            save(root / "imagesTr" / f"{name}_{channel:04d}{ending}", image + channel)
        save(root / "labelsTr" / f"{name}{ending}", label)
    names = {str(channel): f"T{channel + 1}" for channel in range(channels)}
    labels = {"background": 0, "front": 1, "back": 2}
    write(root / "dataset.json", {"channel_names": names, "labels": labels, "file_ending": ending, "numTraining": 5})
    write(root / "splits_final.json", [
        {"train": NAMES[:3], "val": NAMES[3:]}, {"train": NAMES[2:], "val": NAMES[:2]},
    ])  # fmt: skip
    return root


@pytest.fixture
def nnunet(pristine_data: Path, tmp_path: Path) -> Path:
    return as_nnunet(pristine_data, tmp_path / "nnunet")


def names_of(cases: Any) -> list[str]:
    return [case.name for case in cases]


def same(a: list[Volume], b: list[Volume]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(one.image, two.image) and torch.equal(one.label, two.label) and torch.equal(one.truth, two.truth)
        for one, two in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_nnunets_channels_are_stacked_in_order_and_a_fold_gives_the_lists(
    ending: str, pristine_data: Path, tmp_path: Path
) -> None:
    root = as_nnunet(pristine_data, tmp_path / "nnunet", ending=ending)
    found = read_dataset(root, fold=1)
    assert (names_of(found.train), names_of(found.val)) == (NAMES[2:], NAMES[:2])
    assert (found.channels, found.labels) == (2, {0: "background", 1: "front", 2: "back"})
    assert [path.name for path in found.val[0].images] == [f"case_000_000{k}{ending}" for k in (0, 1)]
    (scan,) = find_scans([root / "imagesTr" / f"case_000_000{k}{ending}" for k in (1, 0)], channels=2)
    image = read_scan(scan.path, 2, scan.others)
    first = torch.from_numpy(voxels(root / "imagesTr" / f"case_000_0000{ending}"))
    assert torch.equal(torch.as_tensor(image), torch.stack([first, first + 1]))
    two, plain = load_volumes(found.val, (3.0,) * 3), load_volumes(read_dataset(pristine_data).train[:2], (3.0,) * 3)
    for one, other in zip(two, plain, strict=True):
        assert torch.equal(one.label, other.label)
        assert torch.allclose(one.image[:1], other.image, atol=1e-5)


def test_nnunets_first_version_has_no_keys_of_the_second(nnunet: Path) -> None:
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in NAMES]
    labels = {"0": "background", "1": "front", "2": "back"}
    write(nnunet / "dataset.json", {"modality": {"0": "T1"}, "labels": labels, "training": entries})
    assert read_dataset(nnunet, fold=0).channels == 2
    (nnunet / "dataset.json").unlink()
    assert names_of(read_dataset(nnunet, fold=0).val) == NAMES[3:]


def test_the_entry_dataset_names_files_elsewhere(nnunet: Path) -> None:
    (nnunet / "imagesTr").rename(nnunet / "elsewhere")
    entries = {
        name: {"images": [f"elsewhere/{name}_000{k}.nii.gz" for k in (0, 1)], "label": f"labelsTr/{name}.nii.gz"}
        for name in NAMES
    }
    write(nnunet / "dataset.json", {**read_json(nnunet / "dataset.json"), "dataset": entries})
    assert (read_dataset(nnunet, fold=0).channels, names_of(read_dataset(nnunet, fold=0).val)) == (2, NAMES[3:])


def edit(root: Path, name: str = "dataset.json", **changes: Any) -> None:
    write(root / name, {**read_json(root / name), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "imagesTr/case_001_0001.nii.gz").unlink(),
         "case_001_0001.nii.gz: no such file; expected the channel 1 (T2) of the case 'case_001'"),
        (lambda root: save(root / "imagesTr/case_001_0002.nii.gz", np.ones((18, 20, 16))),
         "case_001_0002.nii.gz: found the channel 2, expected 2 channels"),
        (lambda root: (root / "imagesTr/case_001_0001.nii.gz").rename(root / "imagesTr/case_001_T2.nii.gz"),
         "imagesTr: found case_001_T2.nii.gz, expected case_001_T2_0000.nii.gz, nnU-Net's form"),
        (lambda root: save(root / "imagesTr/case_001_0001.nii.gz", voxels(root / "imagesTr/case_001_0001.nii.gz"),
                           np.diag([2.0, 2, 3, 1])),
         "case_001_0001.nii.gz: found another affine than that of"),
        (lambda root: save(root / "imagesTr/case_001_0001.nii.gz", np.random.default_rng(0).normal(size=(9, 20, 16))),
         "case_001_0001.nii.gz: found shape (9, 20, 16), expected (18, 20, 16) as in"),
        (lambda root: edit(root, file_ending=".png"), "found the file_ending '.png', expected one of .nii.gz, .nii"),
        (lambda root: edit(root, file_ending=".nii"), "case_000_0000.nii.gz, expected files that end in .nii, as"),
        (lambda root: edit(root, channel_names={"1": "T1"}), "found {'1': 'T1'} as channel_names, expected"),
        (lambda root: edit(root, channel_names={"0": "a", "1": "b", "2": "c"}), "expected the channel 2 (c) of"),
        (lambda root: edit(root, labels={"background": 0, "whole": [1, 2]}), "found the region 'whole' of several"),
        (lambda root: write(root / "splits_final.json", {"train": NAMES}), "expected a list of folds"),
        (lambda root: write(root / "splits_final.json", [{"train": NAMES[:2]}]), "expected a list of folds"),
        (lambda root: write(root / "splits_final.json", [{"train": NAMES[:2], "val": ["case_009"]}]),
         "splits_final.json, list 'fold 0/val', names the case 'case_009'"),
        (lambda root: write(root / "splits_final.json", []), "expected a list of folds"),
        (lambda root: (root / "splits_final.json").unlink(), "splits_final.json: no such file, nor has a list in"),
        (lambda root: edit(root, dataset={"case_000": {"images": "a", "label": "b"}}), "as the case 'case_000' of"),
        (lambda root: edit(root, dataset={"case_000": {"images": ["a"], "label": "b"}}), "found 1 images of the case"),
    ],
)  # fmt: skip
def test_what_does_not_fit_nnunets_layout_is_named(
    change: Callable[[Path], None], message: str, nnunet: Path, tmp_path: Path
) -> None:
    change(nnunet)
    with pytest.raises((ValueError, FileNotFoundError), match=r"expected|names") as raised:
        pretrain(PretrainSettings(nnunet, sizes=SIZES, roi=(16,) * 3, steps=1, fold=0), tmp_path / "base")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "base").exists()


def test_a_fold_beside_lists_or_out_of_range_is_an_error(nnunet: Path) -> None:
    with pytest.raises(ValueError, match=r"fold: found 2, expected one of 0, 1 as in .*splits_final\.json"):
        read_dataset(nnunet, fold=2)
    with pytest.raises(ValueError, match="fold: found 0 and the list 'few', expected one of the two"):
        read_dataset(nnunet, fold=0, train_list="few")
    with pytest.raises(ValueError, match="fold: found 0 and a val-fraction, expected one of the two"):
        read_dataset(nnunet, fold=0, val_fraction=0.2)


# -- data lists -------------------------------------------------------------------------------------------------------


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz", **more}


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "dataset.json"])
def test_a_data_list_says_what_trains_and_what_validates(in_file: bool, data: Path) -> None:
    (data / "splits.json").unlink()
    labels = read_json(data / "dataset.json")["labels"]
    lists = {"training": [entry(name) for name in NAMES[1:4]], "validation": [entry(NAMES[4]), entry(NAMES[0])]}
    path = data / ("list.json" if in_file else "dataset.json")
    write(path, {"labels": labels, **lists})
    found = read_dataset(path if in_file else data)
    assert (names_of(found.train), names_of(found.val)) == (NAMES[1:4], [NAMES[4], NAMES[0]])
    assert found.classes == ("front", "back")
    with pytest.raises(ValueError, match=r"val-fraction: found 0\.2 beside .*json, whose lists say which"):
        read_dataset(path if in_file else data, val_fraction=0.2)


def test_folds_of_a_data_list(data: Path) -> None:
    write(data / "list.json", {"training": [entry(name, fold=index % 3) for index, name in enumerate(NAMES)]})
    found = read_dataset(data / "list.json", fold=1)
    assert (names_of(found.val), names_of(found.train)) == ([NAMES[1], NAMES[4]], [NAMES[0], NAMES[2], NAMES[3]])
    with pytest.raises(ValueError, match=r"fold: found 3, expected one of 0, 1, 2 as in .*list\.json"):
        read_dataset(data / "list.json", fold=3)


def test_several_files_of_an_image_are_its_channels(nnunet: Path) -> None:
    entries = []
    for name in NAMES:
        files = [f"{name}/scan_{what}.nii.gz" for what in ("t1", "t1c")]
        (nnunet / name).mkdir()
        for channel, file in enumerate(files):
            shutil.move(nnunet / "imagesTr" / f"{name}_000{channel}.nii.gz", nnunet / file)
        shutil.move(nnunet / "labelsTr" / f"{name}.nii.gz", nnunet / name / "seg.nii.gz")
        entries.append({"image": files, "label": f"{name}/seg.nii.gz"})
    write(nnunet / "list.json", {"training": entries[:3], "validation": entries[3:]})
    found = read_dataset(nnunet / "list.json")
    assert found.channels == 2
    assert names_of(found.val) == ["case_003_scan", "case_004_scan"]  # one name in many folders: theirs before it
    entries[3]["image"][1] = files[1]  # of another case too
    write(nnunet / "list.json", {"training": entries[:3], "validation": entries[3:]})
    with pytest.raises(ValueError, match=r"list\.json: found .*case_004/scan_t1c\.nii\.gz twice, expected each image"):
        read_dataset(nnunet / "list.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.json", {"train": []}, "list.json: found no list 'training' (keys: train), expected a data list"),
        ("list.json", [entry("case_000")], "list.json: found a list, expected an object with labels and training"),
        ("list.txt", {}, "list.txt: found a file, expected the folder of a data set, or a data list (.json)"),
        ("list.json", {"training": [entry("case_000")], "validation": [entry("case_009")]}, "case_009.nii.gz: no such"),
        ("list.json", {"training": [entry("case_000")], "validation": [{"image": "a.nii"}]}, "entry 0 of 'validation'"),
        ("list.json", {"training": [entry("case_000")], "validation": {"a": 1}}, "found {'a': 1} as 'validation'"),
    ],
)
def test_other_forms_of_a_data_list_are_named(name: str, content: Any, message: str, data: Path) -> None:
    (data / "splits.json").unlink()
    write(data / name, content)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read_dataset(data / name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_formats_train_as_nifti_does(suffix: str, pristine_data: Path, tmp_path: Path) -> None:
    itk = pytest.importorskip("itk")
    root = tmp_path / "data"
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
        for name in NAMES:
            image = itk.imread(str(pristine_data / part / f"{name}.nii.gz"))
            itk.imwrite(image, str(root / part / f"{name}{suffix}"))
    for name in ("dataset.json", "splits.json"):
        shutil.copy(pristine_data / name, root / name)
    found, expected = (load_volumes(read_dataset(place).val, (3.0,) * 3) for place in (root, pristine_data))
    assert same(found, expected)


# -- label values -----------------------------------------------------------------------------------------------------


def test_mapped_values_stand_for_others(data: Path) -> None:
    expected = load_volumes(read_dataset(data).val, (3.0,) * 3)
    for path in (data / "labelsTr").iterdir():
        save(path, np.array([0, 255, 4], np.uint8)[voxels(path)])
    with pytest.raises(ValueError, match=r"found label values 4 \(\d+ voxels\), 255 .*expected 0 \(background\)"):
        read_dataset(data)
    found = read_dataset(data, map_labels={255: 1, 4: 2})
    assert same(load_volumes(found.val, (3.0,) * 3), expected)
    edit(data, labels={"0": "background", "255": "front", "4": "back"})  # names go with the values
    assert read_dataset(data, map_labels={255: 1, 4: 2}).labels == {0: "background", 1: "front", 2: "back"}
    with pytest.warns(UserWarning, match="map-labels: no label has the value 9, so that 9=1 does nothing"):
        read_dataset(data, map_labels={255: 1, 4: 2, 9: 1})
    with pytest.raises(ValueError, match="map-labels: found 4=4, expected two different whole numbers from 0"):
        read_dataset(data, map_labels={4: 4})
    edit(data, labels={"0": "background", "1": "front"})
    with pytest.raises(ValueError, match=r"found label values 4 .*; 255 for 1"):
        read_dataset(data, map_labels={255: 1})


@pytest.mark.parametrize("text", ["4", "4=x", "4=1,4=2", "=1", "4=-1"])
def test_a_mapping_that_does_not_parse_is_named(text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["finetune", "--output", str(tmp_path / "run"), "--map-labels", text])
    assert (done.exit_code, (tmp_path / "run").exists()) == (2, False)
    assert f"map-labels: found '{text}', expected" in done.stderr


def with_ignored(root: Path) -> None:
    """Every label has a slab of the value 3, "ignore"."""
    edit(root, labels={"background": 0, "front": 1, "back": 2, "ignore": 3})
    for path in (root / "labelsTr").iterdir():
        label = voxels(path).copy()
        label[:, :, :5] = 3
        save(path, label)


def test_ignored_voxels_are_no_class_and_marked_in_volumes(nnunet: Path) -> None:
    with_ignored(nnunet)
    found = read_dataset(nnunet, fold=0)
    assert found.labels == {0: "background", 1: "front", 2: "back"}
    (volume, *_) = load_volumes(found.val, None)
    assert bool((volume.label[..., :5] == IGNORED).all())
    assert bool((volume.truth[..., 5:] >= 0).all())
    edit(nnunet, labels={"background": 0, "front": 1, "back": 2})
    with pytest.raises(ValueError, match=r"found label values 3 \(1800 voxels\), expected 0 \(background\)"):
        read_dataset(nnunet, fold=0)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 2.0])])
def test_the_loss_leaves_ignored_voxels_out(weight: torch.Tensor | None) -> None:
    """Whatever the network says there, value and gradient are those of a window without these voxels."""
    plain = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, weight=weight)
    loss = IgnoringLoss(plain)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 6, generator=generator)
    labels = torch.randint(0, 3, (2, 1, 4, 4, 6), generator=generator).float()
    assert torch.equal(loss(logits, labels), plain(logits, labels))
    labels[..., 4:] = IGNORED
    logits.requires_grad_()
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    inside = logits.detach()[..., :4].clone().requires_grad_()
    expected = plain(inside, labels[..., :4])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[..., :4], torch.autograd.grad(expected, inside)[0])
    assert not bool(gradient[..., 4:].any())
    nothing = loss(logits, torch.full_like(labels, IGNORED))
    assert bool(nothing.isfinite())
    assert not bool(torch.autograd.grad(nothing, logits)[0].any())


def test_scores_leave_ignored_voxels_out() -> None:
    truth = torch.zeros(1, 4, 4, 4)
    truth[0, :2], truth[0, 2] = 1, IGNORED
    found = truth[0].clone()
    found[2] = 1  # wrong or right, nobody knows
    a, b = one_hot_pair(found.clamp(min=0), truth, 2)
    assert torch.equal(a, b)
    found[3] = 1
    assert not torch.equal(*one_hot_pair(found.clamp(min=0), truth, 2))


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_from_nnunets_layout_to_scores(nnunet: Path, tmp_path: Path) -> None:
    """Two channels, a fold, an ignored value and a mapped one: trained, predicted from channel files, and scored."""
    with_ignored(nnunet)
    for path in (nnunet / "labelsTr").iterdir():
        save(path, np.array([0, 7, 2, 3], np.uint8)[voxels(path)])
    base, run, maps = tmp_path / "base", tmp_path / "run", tmp_path / "maps"
    common: dict[str, Any] = {"fold": 0, "map_labels": {7: 1}}
    pretrain(PretrainSettings(nnunet, sizes=SIZES, roi=(16,) * 3, steps=2, **common), base)
    settings = FinetuneSettings(nnunet, base / "base.safetensors", methods=("head",), steps=2, **common)
    finetune(settings, run)
    finetune(settings, run, resume=True)
    assert read_json(run / "run.json")["settings"]["map_labels"] == {"7": 1}
    predict_scans(load_predictor(run), [nnunet / "imagesTr"], maps, PredictOptions(overlays=False))
    assert sorted(path.name for path in maps.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in NAMES]
    evaluate(EvaluateSettings(run, predictions=(maps,)), tmp_path / "scores")
    by_method: dict[str, list[str]] = {}
    for row in read_csv(tmp_path / "scores/scores.csv"):
        assert row["case"] in NAMES[3:]
        by_method.setdefault(row["method"], []).append(row["dice"])
    assert by_method["maps"] == by_method["head"]
    own = {row["case"]: row for row in read_csv(run / "head/seed0/cases.csv")}
    assert sorted(by_method["head"]) == sorted(
        row[f"dice {name}"] for row in own.values() for name in ("front", "back")
    )
    result = evaluate(EvaluateSettings(run, nnunet, fold=1), tmp_path / "other")
    assert result["cases"] == NAMES[:2]
    with pytest.raises(ValueError, match="list: found 'test' of fold 1, expected one of train, val"):
        evaluate(EvaluateSettings(run, nnunet, fold=1, case_list="test"), tmp_path / "third")
    with pytest.raises(ValueError, match=r"found label values 7"):
        evaluate(EvaluateSettings(run, nnunet, map_labels={9: 1}), tmp_path / "third")


def test_channel_files_of_scans(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        save(tmp_path / f"{name}.nii.gz", rng.normal(size=(4, 5, 6)))
    scans = find_scans([tmp_path], channels=2)
    assert [(scan.name, scan.output, len(scan.others)) for scan in scans] == [
        ("a", "a.nii.gz", 1), ("b", "b.nii.gz", 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"found the channels _0000, _0001 of the scan 'a', expected _0000 to _0002"):
        find_scans([tmp_path], channels=3)
    # a network of one channel: numbers of scans, unless all of them are 0000
    assert [scan.name for scan in find_scans([tmp_path])] == ["a_0000", "a_0001", "b_0000", "b_0001"]
    for name in "ab":
        (tmp_path / f"{name}_0001.nii.gz").unlink()
    assert [scan.name for scan in find_scans([tmp_path])] == ["a", "b"]
    # files that hold both channels are scans, whatever numbers they have
    for number in (0, 1):
        save(tmp_path / "four" / f"c_000{number}.nii.gz", rng.normal(size=(4, 5, 6, 2)))
    assert [scan.name for scan in find_scans([tmp_path / "four"], channels=2)] == ["c_0000", "c_0001"]
    save(tmp_path / "a_0001.nii.gz", rng.normal(size=(4, 5, 7)))
    (scan,) = find_scans([tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz"], channels=2)
    with pytest.raises(ValueError, match=r"a_0001\.nii\.gz: found 4x5x7 voxels, expected 4x5x6 as in"):
        read_scan(scan.path, 2, scan.others)
