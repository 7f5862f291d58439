"""learn-factors: a subspace from a data set, over which finetune adapts; and a run over learned factors resumed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tcurlora_ext as tcur
from tcurlora_ext.adapter.learning import warmup
from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv, write_json
from tcurlora_ext.segmentation import training
from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.network import load_adapted, load_base
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output + (result.stderr if result.exit_code else "")


@pytest.fixture
def subspace(pristine_data: Path, base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "factors" / "family.safetensors"
    code, text = command(
        "learn-factors", "--data", pristine_data, "--pretrained", base, "--output", path, "--rank", 2, "--steps", 3
    )
    assert code == 0, text
    assert "stacks" in text
    assert f"{path}: " in text.replace("\n", "")
    return path


def test_finetune_adapts_over_it_and_its_file_is_the_cores_alone(
    pristine_data: Path, base: Path, subspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, text = command(
        "finetune", "--data", pristine_data, "--pretrained", base, "--output", out, "--steps", 3, "--method", "head",
        "--factors", subspace,
    )  # fmt: skip
    assert code == 0, text
    rows = {row["method"]: row for row in read_csv(out / "summary.csv")}
    assert list(rows) == ["head", "tcur-carried"]
    learned = tcur.Subspace.load(subspace)
    trained = {name: int(row["trained_numbers"]) for name, row in rows.items()}
    assert trained["tcur-carried"] - trained["head"] == learned.parameters
    adapter = out / "tcur-carried" / "seed0" / "adapter.safetensors"
    assert int(rows["tcur-carried"]["adapter_bytes"]) == adapter.stat().st_size < subspace.stat().st_size
    model = load_adapted(out, "tcur-carried")
    assert any(bool(stack.core.any()) for stack in tcur.stacks(model).values())


def test_a_file_that_is_there_is_replaced_only_when_asked_and_a_run_over_it_then_stops(
    pristine_data: Path, base: Path, subspace: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "run", subspace.read_bytes()
    words = ("finetune", "--steps", 1, "--method", "head")
    code, text = command(*words, "--data", pristine_data, "--pretrained", base, "--output", out, "--factors", subspace)
    assert code == 0, text
    again = ("learn-factors", "--data", pristine_data, "--pretrained", base, "--output", subspace, "--steps", 1)
    code, text = command(*again)
    assert code == 2
    assert f"{subspace}: the file exists; expected a new one, or --overwrite" in text
    assert subspace.read_bytes() == before
    code, text = command(*again, "--rank", 2, "--overwrite")
    assert code == 0, text
    code, text = command("finetune", "--resume", out, "--seeds", 2)
    assert code == 2
    old, new = (tcur.Subspace.load(p).digest[:12] for p in (out / "tcur-carried/seed0/subspace.safetensors", subspace))
    assert f"{subspace}: found the subspace {new}, expected {old}, over which {out / 'tcur-carried/seed0'}" in text


def test_several_data_sets_take_turns(pristine_data: Path, base: Path, tmp_path: Path) -> None:
    second, path = tmp_path / "second", tmp_path / "family.safetensors"
    shutil.copytree(pristine_data, second)
    words = ("learn-factors", "--data", pristine_data, "--pretrained", base, "--steps", 2, "--rank", 1)
    code, text = command(*words, "--output", path, "--data", second)
    assert code == 0, text
    assert tcur.Subspace.load(path).about["tasks"] == 2
    write_json(second / "dataset.json", {"labels": {"0": "background", "1": "a", "2": "b", "3": "c", "4": "d"}})
    code, text = command(*words, "--output", tmp_path / "other.safetensors", "--data", second)
    assert code == 2
    assert f"{second}: found 5 classes, expected 3 as in {pristine_data}" in text
    assert not (tmp_path / "other.safetensors").exists()


def test_a_warm_up_is_counted_and_not_repeated_by_a_resumed_run(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(methods=("tcur-learned:rank=2:warm_up=3",))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finetune(chosen, whole)
    (row,) = read_csv(whole / "metrics.csv")
    assert (row["steps"], row["warm_up_steps"]) == ("6", "3")
    train = training.train

    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(chosen, stopped)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(warmup, "_train", interrupted)  # the factors are there already
    finetune(chosen, stopped, resume=True)
    folder = Path("tcur-learned_rank=2_warm_up=3") / "seed0"
    for name in ("adapter.safetensors", "subspace.safetensors", "cases.csv"):
        assert (stopped / folder / name).read_bytes() == (whole / folder / name).read_bytes()


def test_the_warm_up_draws_other_windows_than_the_training(pristine_data: Path, base: Path) -> None:
    volumes = load_volumes(read_dataset(pristine_data).train, None)
    plan = training.Plan(3, 2, 1e-2, 0, (16, 16, 16))
    seen: list[torch.Tensor] = []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = load_base(base.parent)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return self.inner(x)

    for _ in range(2):
        step = training.loss_step(volumes, plan)
        step(Watched())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], training.Sampler(volumes, plan)(0)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", 99), "does not fit"),
        (("--bits", 3), "bits is 3, expected one of 1, 2, 4"),
        (("--steps", 0), "steps: found 0"),
        (("--pretrained", "nothing.safetensors"), "nothing.safetensors"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: tuple[object, ...], message: str, pristine_data: Path, base: Path, tmp_path: Path
) -> None:
    given = {"--data": pristine_data, "--pretrained": base, "--output": tmp_path / "out" / "family.safetensors"}
    given |= {"--steps": 2, words[0]: words[1]}
    code, text = command("learn-factors", *(word for pair in given.items() for word in pair))
    assert code == 2
    assert text.startswith("error: ")
    assert message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_says_that_nothing_was_written(
    pristine_data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, loss_step = tmp_path / "out" / "family.safetensors", training.loss_step

    def pressed(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return loss_step(*given)

    monkeypatch.setattr(training, "loss_step", pressed)
    words = ("learn-factors", "--data", pristine_data, "--pretrained", base, "--output", out)
    code, text = command(*words)
    assert (code, text.splitlines()[-1]) == (130, "interrupted; nothing was written")
    assert not out.parent.exists()


def test_a_subspace_of_another_network_is_refused_before_the_run(
    pristine_data: Path, base: Path, tmp_path: Path, settings: Callable[..., FinetuneSettings]
) -> None:
    path = tmp_path / "family.safetensors"
    other = load_base(base.parent)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    x = torch.randn(1, 1, 16, 16, 16)
    config = tcur.TCURConfig.preset("learned", rank=1)
    tcur.learn_factors(other, config, lambda model: model(x).square().mean(), 1).save(path)
    with pytest.raises(ValueError, match="the subspace was learned on other base weights"):
        finetune(settings(methods=("tcur-carried",), factors=path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no method that takes them"):
        finetune(settings(methods=("head",), factors=path), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="missing"):
        finetune(settings(methods=("tcur-carried",), factors=tmp_path / "missing"), tmp_path / "run")


def test_one_learning_rate_is_for_methods_with_options_too(pristine_data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text = command(
        "finetune", "--data", pristine_data, "--pretrained", base, "--output", out, "--steps", 1, "--lr", 0.02,
        "--method", "head,tcur:rank=2:alpha=2",
    )  # fmt: skip
    assert code == 0, text
    assert [(row["method"], row["lr"]) for row in read_csv(out / "metrics.csv")] == [
        ("head", "0.02"), ("tcur:rank=2:alpha=2.0", "0.02"),
    ]  # fmt: skip
