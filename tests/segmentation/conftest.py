"""A tiny data set on disk, a tiny pretrained network, and settings small enough for many runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai")
pytest.importorskip("einops")
pytest.importorskip("peft")

import nibabel as nib
import numpy as np
import torch
from torch import nn

from tcurlora_ext.io.records import write_json
from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.methods import Task
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings, pretrain
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import Plan, train

SIZES = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "features": 4}
NAMES = [f"case_{index:03d}" for index in range(5)]


def write_case(root: Path, name: str, image: np.ndarray, label: np.ndarray) -> None:
    for part, volume in (("imagesTr", image), ("labelsTr", label)):
        (root / part).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0])), root / part / f"{name}.nii.gz")


@pytest.fixture(scope="session")
def pristine_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases of 18x20x16 voxels: two bright boxes in noise, labels 1 and 2."""
    root = tmp_path_factory.mktemp("data")
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        label = np.zeros((18, 20, 16), np.uint8)
        corner = rng.integers(2, 6, 3)
        x, y, z = corner
        label[x : x + 5, y : y + 6, z : z + 5] = 1
        label[x + 5 : x + 9, y : y + 6, z : z + 5] = 2
        image = (label * 2.0 + rng.normal(0, 0.3, label.shape)).astype(np.float32)
        write_case(root, name, image, label)
    write_json(root / "dataset.json", {"labels": {"0": "background", "1": "front", "2": "back"}})
    write_json(root / "splits.json", {"train": NAMES[:3], "val": NAMES[3:], "few": {"one": NAMES[:1]}})
    return root


@pytest.fixture
def data(pristine_data: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(pristine_data, tmp_path / "data"))


@pytest.fixture(scope="session")
def base(pristine_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny ViT segmenter after a few steps."""
    folder = tmp_path_factory.mktemp("base") / "run"
    pretrain(PretrainSettings(pristine_data, sizes=SIZES, roi=(16, 16, 16), steps=8, lr=3e-3), folder)
    return folder / "base.safetensors"


@pytest.fixture
def settings(pristine_data: Path, base: Path) -> Callable[..., FinetuneSettings]:
    """Finetune settings on the tiny data; keywords change them."""
    small = FinetuneSettings(
        pristine_data, base, methods=("head", "tcur"), steps=6, rank=4, lora_rank=2, checkpoint_every=2
    )

    def make(**changes: Any) -> FinetuneSettings:
        return replace(small, **changes)

    return make


@pytest.fixture(scope="session")
def finished_run(pristine_data: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the methods head and tcur, two seeds each; tests do not change it."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    finetune(
        FinetuneSettings(
            pristine_data, base, methods=("head", "tcur"), seeds=2, steps=6, rank=4, spacing=(2.5, 2.5, 2.5)
        ), folder,
    )  # fmt: skip
    return folder


@pytest.fixture
def task(pristine_data: Path, tmp_path: Path) -> Task:
    """Three steps on the tiny data, for a method that looks at them."""
    volumes = load_volumes(read_dataset(pristine_data).train, None)
    return Task(volumes, Plan(3, 2, 1e-2, 0, (16, 16, 16)), torch.device("cpu"), tmp_path)


@pytest.fixture
def train_steps(task: Task) -> Callable[..., None]:
    """Trains a model for some steps of the task, by default all three."""

    def run(model: nn.Module, steps: int = task.plan.steps) -> None:
        train(model, task.volumes, replace(task.plan, steps=steps), task.folder / "steps")

    return run
