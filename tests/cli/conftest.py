"""The run folder that the tests of several commands begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import tcurlora_ext as tcur

from .adapted_run import SIZES, Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    networks = pytest.importorskip("tcurlora_ext.segmentation.networks")
    folder = tmp_path_factory.mktemp("run")
    config = networks.NetworkConfig("vit", 1, 2, (16, 16, 16), None, SIZES)
    config.save(folder / "network.json")
    model = networks.build_network(config)
    networks.save_weights(model, folder / "base.safetensors")
    tcur.inject(model, tcur.TCURConfig(rank=(2, 3)))
    tcur.unfreeze(model, ["out"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-2)
    (folder / "tcur" / "seed0").mkdir(parents=True)
    tcur.save_adapter(model, folder / "tcur" / "seed0" / "adapter.safetensors")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(made, tmp_path / "run"))
