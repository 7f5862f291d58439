"""finetune and pretrain from the command line: options in a file, --resume DIR, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("monai")
pytest.importorskip("peft")

import nibabel as nib
import numpy as np

from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv, read_json, write_json
from tcurlora_ext.segmentation.runs import finetuning as run
from tcurlora_ext.segmentation.runs import pretraining
from tcurlora_ext.segmentation.runs.folder import describe
from tcurlora_ext.segmentation.runs.pretraining import PretrainSettings
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings, read_settings
from tcurlora_ext.segmentation.training import loop
from tcurlora_ext.segmentation.training.plan import Plan

SIZES = '{"hidden_size": 16, "mlp_dim": 32, "num_layers": 1, "num_heads": 2, "features": 4}'


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path, bool]]:
    """What the commands would start: settings, folder, whether it is resumed."""
    calls: list[tuple[Any, Path, bool]] = []
    for module, name in ((run, "finetune"), (pretraining, "pretrain")):
        monkeypatch.setattr(
            module, name, lambda settings, out, *, resume, display: calls.append((settings, out, resume))
        )
    return calls


def recorded(folder: Path, name: str, settings: Any, **others: Any) -> Path:
    folder.mkdir()
    write_json(folder / "run.json", {**describe(name, settings), **others})
    return folder


FULL = {
    "data": "somewhere", "pretrained": "base.safetensors", "method": ["head", "tcur:rank=2"], "seeds": 2, "roi": 16,
    "spacing": [1, 1, 2.5], "sizes": {"hidden_size": 192}, "lr": {"tcur": 0.01, "head": 1e-5},
    "class_weights": [0.5, 1, 2], "flips": True, "amp": "bf16", "val-fraction": 0.3,
    "labels": ["background", "front"], "also_train": None,
    "log": "tensorboard", "tune": True, "tune-over": ["rank"], "cache": "prepared",
}  # fmt: skip
EXPECTED = FinetuneSettings(
    Path("somewhere"), Path("base.safetensors"), ("head", "tcur:rank=2"), 2, roi=(16, 16, 16), spacing=(1.0, 1.0, 2.5),
    sizes={"hidden_size": 192}, lr={"tcur": 0.01, "head": 1e-5}, class_weights=(0.5, 1.0, 2.0), flips=True, amp="bf16",
    val_fraction=0.3, labels=("background", "front"), log=("tensorboard",), tune=True, tune_over=("rank",),
    cache=Path("prepared"),
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_options_from_a_file_are_those_of_the_command_line(
    suffix: str, started: list[tuple[Any, Path, bool]], tmp_path: Path
) -> None:
    import yaml

    path = tmp_path / f"options{suffix}"
    path.write_text(json.dumps(FULL) if suffix == ".json" else yaml.safe_dump(FULL))
    assert command("finetune", "--config", path, "--output", tmp_path / "run").exit_code == 0
    assert started.pop() == (EXPECTED, tmp_path / "run", False)
    # the command line goes over the file
    assert command("finetune", "--seeds", 3, "--config", path, "--lr", "0.5", "--amp", "off").exit_code == 0
    settings, out, _ = started.pop()
    assert (settings.seeds, settings.amp, settings.lr) == (3, "off", {"head": 0.5, "tcur": 0.5})
    assert (settings.class_weights, out) == ((0.5, 1.0, 2.0), Path("runs/finetune"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "steps: 3\nstepz: 4\nresume: true", "found stepz, resume, expected options of finetune"),
        ("a.yaml", "- steps", "found a list, expected options with their values"),
        ("a.yaml", "steps: [", "not valid YAML"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "val-list: a\nval_list: b", "found val_list twice"),
        ("a.yaml", "roi: [16, 16]", "roi: found '16,16'"),
        ("a.yaml", "class-weights: heavy", "class-weights: found 'heavy', expected numbers"),
        ("a.toml", "steps = 3", "found the suffix '.toml', expected .yaml, .yml or .json"),
    ],
)
def test_a_wrong_file_of_options_is_named(
    name: str, content: str, message: str, started: list[tuple[Any, Path, bool]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    done = command("finetune", "--config", tmp_path / name)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not started
    assert "no such file" in command("finetune", "--config", tmp_path / "nothing.yaml").stderr


@pytest.mark.parametrize("name", ["finetune", "pretrain"])
def test_options_without_effect_are_said(
    name: str, started: list[tuple[Any, Path, bool]], tmp_path: Path
) -> None:  # fmt: skip
    words = (name, "--output", tmp_path / "run", "--select-every", 3, "--subject-pattern", "(.)")
    done = command(*words)
    assert (done.exit_code, len(started)) == (0, 1)
    assert done.stderr == (
        "warning: --select-every, --subject-pattern: no effect without --select best or --patience\n"
    )
    assert command(*words, "--patience", 1).stderr == ""
    if name == "finetune":
        tuning = ("finetune", "--trials", 2, "--tune-over", "rank")
        assert command(*tuning).stderr == "warning: --trials, --tune-over: no effect without --tune\n"
        assert command(*tuning, "--tune", "--subject-pattern", "(.)").stderr == ""


def test_a_rate_of_a_method_that_does_not_run_is_said(started: list[tuple[Any, Path, bool]], tmp_path: Path) -> None:
    said = "warning: --lr tcur, --lr decoder: no effect, as no such method runs\n"
    rates = ("--lr", "tcur=1e-2,decoder=1,head=1")
    assert command("finetune", "--method", "head", *rates).stderr == said
    assert command("finetune", "--method", "tcur:rank=2", *rates).stderr == ""  # head or decoder trains beside it
    assert command("finetune", "--method", "head", "--lr", "1").stderr == ""
    assert len(started) == 3
    # a rate that a resumed run has is not said again
    folder = recorded(tmp_path / "run", "finetune", replace(EXPECTED, methods=("head",)))
    assert command("finetune", "--resume", folder).stderr == ""


def test_resume_takes_the_settings_from_the_folder(started: list[tuple[Any, Path, bool]], tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run", "finetune", EXPECTED)
    assert command("finetune", "--resume", folder).exit_code == 0
    assert started.pop() == (EXPECTED, folder, True)
    assert command("finetune", folder, "--resume", "--method", "lora", "--seeds", 4, "--lr", "lora=1").exit_code == 0
    settings, _, _ = started.pop()
    assert settings.methods == ("head", "tcur:rank=2", "lora")
    assert (settings.seeds, settings.lr) == (4, {**EXPECTED.lr, "lora": 1.0})
    assert (settings.steps, settings.roi) == (EXPECTED.steps, EXPECTED.roi)
    # as before: a flag beside --output, with all the options again
    assert command("finetune", "--resume", "--output", folder, "--steps", 7).exit_code == 0
    assert started.pop() == (FinetuneSettings(steps=7), folder, True)
    base = PretrainSettings(network="unetr", roi=(32, 32, 16), steps=5, patience=2)
    folder = recorded(tmp_path / "base", "pretrain", base)
    assert command("pretrain", "--resume", folder).exit_code == 0
    assert started.pop() == (base, folder, True)


def test_what_cannot_be_resumed_is_named(started: list[tuple[Any, Path, bool]], tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run", "finetune", EXPECTED)
    for words, message in (
        (("finetune", "--resume", tmp_path / "nothing"), "run.json: no such file; expected the folder of a run"),
        (("pretrain", "--resume", folder), "found a run of 'finetune', expected one of pretrain"),
        (("finetune", folder), "without --resume"),
        (("finetune", "--resume", folder, "--output", tmp_path / "other"), "found"),
        (("pretrain",), "output: found none"),
        (("finetune", "--resume"), "resume: found no folder, expected that of the run: --resume DIR"),
    ):
        done = command(*words)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
    write_json(folder / "run.json", {"command": "finetune", "settings": {"depth": 3}})
    with pytest.raises(ValueError, match="found the settings depth"):
        read_settings(folder, "finetune", FinetuneSettings)
    assert not started


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for index in range(3):
        rng = np.random.default_rng(index)
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:9, 5:10, 3:9] = 1
        for part, volume in (("imagesTr", label + rng.normal(0, 0.3, label.shape)), ("labelsTr", label)):
            (root / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume.astype(np.float32), np.eye(4)), root / part / f"case_{index}.nii.gz")
    write_json(root / "splits.json", {"train": ["case_0", "case_1"], "val": ["case_2"]})
    return root


def pressing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], None]:
    """Press Ctrl-C in a step, once; the returned function ends that."""
    schedule, pressed = loop.schedule, []

    def press(plan: Plan, step: int) -> float:
        if step == at and not pressed:
            pressed.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return schedule(plan, step)

    monkeypatch.setattr(loop, "schedule", press)
    return monkeypatch.undo


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_saves_and_prints_the_command_that_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tmp_path / "the base", tmp_path / "run"
    words = ("pretrain", "--data", data, "--sizes", SIZES, "--roi", 16, "--steps", 4, "--output")
    release = pressing(monkeypatch, 2)
    done = command(*words, base)
    assert done.exit_code == 130
    assert f"interrupted; it goes on with: tcurlora pretrain --resume '{base}'" in done.stderr
    release()
    assert command("pretrain", "--resume", base).exit_code == 0
    assert command(*words, tmp_path / "whole").exit_code == 0
    weights = "base.safetensors"
    assert (base / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()

    words = (
        "finetune",
        "--data",
        data,
        "--pretrained",
        base / weights,
        "--method",
        "head,tcur",
        "--rank",
        2,
        "--steps",
        4,
    )
    release = pressing(monkeypatch, 1)
    done = command(*words, "--output", out)
    assert done.exit_code == 130
    assert f"tcurlora finetune --resume {out}" in done.stderr
    steps = [row["step"] for row in read_csv(out / "head/seed0/metrics.csv")]
    assert steps == ["0", "1", "2"]  # the step in which it was pressed is the last
    release()
    done = command("finetune", "--resume", out)
    assert done.exit_code == 0, done.stderr
    assert "head, seed 0: step 4 of 4, loss " in done.stdout
    assert command(*words, "--output", tmp_path / "other").exit_code == 0
    for name in ("head/seed0/adapter.safetensors", "tcur/seed0/adapter.safetensors", "tcur/seed0/cases.csv"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    # more seeds of a finished run
    assert command("finetune", "--resume", out, "--seeds", 2).exit_code == 0
    assert read_json(out / "run.json")["settings"]["seeds"] == 2
    assert len(read_csv(out / "metrics.csv")) == 4
    shutil.rmtree(out)
    monkeypatch.setattr(run, "finetune", lambda *given, **named: os.kill(os.getpid(), signal.SIGINT))
    done = command(*words, "--output", out)
    assert (done.exit_code, done.stderr) == (130, "interrupted before anything was written\n")
