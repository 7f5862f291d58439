"""Real MRI, where the data set lies beside the project: it passes the checks and a network learns from it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.dataset import read_dataset
from tcurlora_ext.segmentation.prediction import PredictOptions, predict_scans
from tcurlora_ext.segmentation.prediction.predictor import load_predictor
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings

ROOT = Path(__file__).parents[2].parent / "shared" / "data" / "hippocampus"
LABELS = ("background", "anterior", "posterior")
SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2, "features": 4}

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason="../shared/data/hippocampus is not there")


def test_the_few_shot_list_and_its_validation_cases_pass_every_check() -> None:
    found = read_dataset(ROOT, train_list="5_subjects_seed0", labels=LABELS)
    assert (len(found.train), len(found.val), found.channels) == (5, 48, 1)
    assert not {case.name for case in found.train} & {case.name for case in found.val}


def test_a_short_run_learns(tmp_path: Path) -> None:
    base = tmp_path / "base"
    few = {"train_list": "5_subjects_seed0", "val_list": "5_subjects_seed1", "labels": LABELS}
    pretrain(PretrainSettings(ROOT, sizes=SIZES, roi=(24, 32, 24), spacing=(2.0,) * 3, steps=20, lr=3e-3, **few), base)
    losses = [float(row["loss"]) for row in read_csv(base / "metrics.csv") if row["loss"]]
    assert sum(losses[-5:]) < sum(losses[:5])
    (summary,) = finetune(
        FinetuneSettings(ROOT, base / "base.safetensors", methods=("tcur",), steps=3, rank=4, **few), tmp_path / "run"
    )
    assert summary["trained_numbers"] < 1000
    assert (tmp_path / "run/report.html").is_file()
    # new scans: the label map is the same, voxel by voxel, however the scan's voxels are stored
    image = nib.load(ROOT / "images" / "hippocampus_006.nii.gz")
    turned = np.array([[2, -1], [0, 1], [1, -1]], dtype=float)
    nib.save(image.as_reoriented(turned), tmp_path / "turned.nii.gz")
    for name, path in (("own", ROOT / "images" / "hippocampus_006.nii.gz"), ("turned", tmp_path / "turned.nii.gz")):
        options = PredictOptions(probabilities=True)  # so short a run may find nothing but background
        predict_scans(load_predictor(tmp_path / "run"), [path], tmp_path / name, options)
    for folder in ("", "probabilities"):
        own = nib.load(tmp_path / "own" / folder / "hippocampus_006.nii.gz")
        other = np.asarray(nib.load(tmp_path / "turned" / folder / "turned.nii.gz").dataobj)
        assert own.shape[:3] == image.shape
        np.testing.assert_array_equal(own.affine, image.affine)
        np.testing.assert_allclose(np.asarray(own.as_reoriented(turned).dataobj), other, atol=1e-6)
    assert np.asarray(own.dataobj)[..., 1].std() > 1e-3
