"""The scripts in examples/, run as their user would run them, on inputs that take seconds."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA = ["--hidden", "32", "--layers", "2", "--length", "32", "--characters", "60000", "--steps", "20"]
UNETR = ["--hidden", "24", "--features", "2", "--rank", "2", "--steps", "4", "--cases", "2"]
VIT = ["--steps", "40", "--pretrain-steps", "60", "--batch", "16", "--rank", "4"]
SERVE = ["--hidden", "32", "--layers", "2", "--rank", "2"]
MANY = ["--tasks", "6", "--alone", "3", "--steps", "10", "--width", "16", "--blocks", "2", "--pretrain-steps", "20"]
NNUNET = "adapt_plainconvunet.py"  # its package, nnU-Net's, is seldom there: it is run apart from RUNS
PACKAGES = (
    "nibabel", "monai", "einops", "transformers", "accelerate", "peft", "sklearn", "fastapi", "uvicorn", "httpx",
    "PIL.Image",
)  # fmt: skip

Script = Callable[..., str]
Run = tuple[Path, str]  # the output folder and what was printed


@pytest.fixture(scope="session", autouse=True)
def _packages() -> None:
    """What the scripts import: without any of it none of the tests here is run."""
    for package in PACKAGES:
        pytest.importorskip(package)


def printed(name: str, *arguments: str | Path) -> str:
    """What a script prints, run as a command on one thread with no network to fall back on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(output: str) -> dict[str, list[str]]:
    """Rows of the printed table by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """What a script prints when run in this process: importing everything is what takes long."""

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(again: Script, capsys: pytest.CaptureFixture[str]) -> Script:
    """What a script says of wrong input."""

    def run(name: str, *arguments: str | Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            again(name, *arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def decathlon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six volumes in the layout of MSD's tasks, of about the size of Task04's: two bright boxes in noise."""
    nib = pytest.importorskip("nibabel")
    root = tmp_path_factory.mktemp("data") / "Task04_Hippocampus"
    pairs = []
    for index in range(6):
        rng = np.random.default_rng(index)
        label = np.zeros((34, 48, 36), np.uint8)
        label[8:16, 12:34, 10:22], label[16:24, 12:34, 10:22] = 1, 2
        image = (label * 100 + rng.normal(0, 20, label.shape)).astype(np.float32)
        name = f"hippocampus_{index:03d}.nii.gz"
        for part, volume in (("imagesTr", image), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), root / part / name)
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": pairs}))
    return root


def run_unetr(folder: Path, decathlon: Path) -> str:
    return printed(
        "unetr_hippocampus.py", "--data", decathlon, "--output", folder, *UNETR, "--pretrain-steps", "40",
    )  # fmt: skip


def run_llama(folder: Path, decathlon: Path) -> str:
    return printed("llama_peft.py", "--output", folder, *LLAMA, "--pretrain-steps", "60")


def run_vit(folder: Path, decathlon: Path) -> str:
    return printed("vit_classification.py", "--output", folder, *VIT)


def run_serve(folder: Path, decathlon: Path) -> str:
    return printed("serve_adapters.py", "--load-test", "2", "--clients", "4", "--many", "5", *SERVE)


def run_many(folder: Path, decathlon: Path) -> str:
    return printed("train_many.py", *MANY)


def run_groups(folder: Path, data: Path) -> str:
    """Its simulated subjects; folder and data are not needed."""
    del folder, data
    return printed("volumes_to_groups.py", "--permutations", "5", "--repeats", "1")


RUNS: dict[str, Callable[[Path, Path], str]] = {
    "unetr_hippocampus.py": run_unetr,
    "llama_peft.py": run_llama,
    "vit_classification.py": run_vit,
    "serve_adapters.py": run_serve,
    "train_many.py": run_many,
    "volumes_to_groups.py": run_groups,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, decathlon: Path) -> Callable[[str], Run]:
    """By a script's name its output folder and what it printed; each is run once."""
    done: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in done:
            folder = tmp_path_factory.mktemp(Path(name).stem)
            done[name] = folder, RUNS[name](folder, decathlon)
        return done[name]

    return run
