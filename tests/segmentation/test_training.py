"""Steps without hidden state: a resumed training has the bits of an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tcurlora_ext.io.atomic import replacing, write_bytes
from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.io.tensors import read_checkpoint
from tcurlora_ext.segmentation.dataset import load_volumes, read_dataset
from tcurlora_ext.segmentation.networks import NetworkConfig, build_network
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import Plan, Sampler, loop, schedule, train, trainable


class Interrupted(Exception):
    pass


def results(run: Path) -> dict[str, bytes | list[dict[str, str]]]:
    """Every file that should be the same for the same settings; tables without their times."""
    found: dict[str, bytes | list[dict[str, str]]] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors" or path.name in ("cases.csv", "network.json"):
            found[name] = path.read_bytes()
        elif path.suffix == ".csv":
            rows = read_csv(path)
            found[name] = [{k: value for k, value in row.items() if k not in ("seconds", "step_ms")} for row in rows]
    return found


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, pristine_data: Path, base: Path) -> Path:
    """A run that nothing interrupted, with the settings of `settings()`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finetune(
        FinetuneSettings(
            pristine_data, base, methods=("head", "tcur"), steps=6, rank=4, lora_rank=2, checkpoint_every=2
        ),
        out,
    )
    return out


def test_a_step_is_a_function_of_seed_and_step(pristine_data: Path) -> None:
    volumes = load_volumes(read_dataset(pristine_data).train, None)
    first, again = (Sampler(volumes, Plan(9, 2, 1e-3, 0, (16, 16, 16))) for _ in range(2))
    first(1)
    first(2)
    for a, b in zip(first(7), again(7), strict=True):
        assert torch.equal(a, b)
    other = Sampler(volumes, Plan(9, 2, 1e-3, 1, (16, 16, 16)))
    assert not torch.equal(first(7)[0], other(7)[0])
    assert not torch.equal(first(7)[0], first(8)[0])


def test_dropout_too_is_the_same_after_a_resume(
    pristine_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 1, "num_heads": 2, "features": 4, "dropout_rate": 0.3}
    config = NetworkConfig("vit", 1, 3, (16, 16, 16), None, sizes)
    volumes, plan = load_volumes(read_dataset(pristine_data).train, None), Plan(5, 2, 1e-3, 0, (16, 16, 16), 0.01, 2)
    whole = build_network(config)
    expected = train(whole, volumes, plan, tmp_path / "whole")
    interrupt_at(monkeypatch, step=3)
    with pytest.raises(Interrupted):
        train(build_network(config), volumes, plan, tmp_path / "parts")
    monkeypatch.undo()
    torch.manual_seed(123)  # whatever the caller's random state is
    resumed = build_network(config)
    progress = train(resumed, volumes, plan, tmp_path / "parts")
    assert progress.losses == expected.losses
    for (name, a), b in zip(trainable(whole).items(), trainable(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def raise_at(plan: Plan, now: int) -> float:
        if now == step:
            raise Interrupted
        return schedule(plan, now)

    monkeypatch.setattr(loop, "schedule", raise_at)


@pytest.mark.parametrize("step", [0, 3, 5])
def test_resume_after_an_interruption_gives_the_same_files(
    step: int,
    whole_run: Path,
    settings: Callable[..., FinetuneSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt_at(monkeypatch, step)
    with pytest.raises(Interrupted):
        finetune(settings(), tmp_path / "run")
    monkeypatch.undo()
    finetune(settings(), tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(whole_run)


KILL = """
import os, signal, sys
from pathlib import Path
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings

rename = Path.replace
def replace(self, target):
    # the temporary file is written and flushed; the rename does not happen
    if Path(target).parent.parent.name == "tcur" and Path(target).name == "checkpoint.pt" and Path(target).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
finetune(FinetuneSettings(Path(sys.argv[1]), Path(sys.argv[2]), methods=("head", "tcur"), steps=6, rank=4, lora_rank=2,
                          checkpoint_every=2), Path(sys.argv[3]))
"""


def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    whole_run: Path, pristine_data: Path, base: Path, settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILL, str(pristine_data), str(base), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums of the same bits
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    checkpoint = read_checkpoint(out / "tcur/seed0/checkpoint.pt")  # the earlier one, whole
    assert checkpoint["step"] == 2
    assert (out / "head/seed0/result.json").is_file()
    assert not (out / "report.html").exists()
    finetune(settings(), out, resume=True)
    assert results(out) == results(whole_run)


def test_a_finished_method_is_not_run_again(
    whole_run: Path, settings: Callable[..., FinetuneSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 0)  # any step would raise
    before = results(whole_run)
    finetune(settings(), whole_run, resume=True)
    assert results(whole_run) == before


def test_a_resumed_run_takes_the_threads_of_its_start(
    whole_run: Path, settings: Callable[..., FinetuneSettings]
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        finetune(settings(), whole_run, resume=True)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, "the run has steps = 6, found 7 now"),
        ({"rank": 3}, "the run has rank = 4, found 3 now"),
        ({"methods": ("head",)}, "methods"),
        ({"lr": {"head": 0.5}}, "lr.head = 0.1, found 0.5 now"),
    ],
)
def test_resume_with_other_settings_names_the_setting(
    changes: dict[str, object], message: str, whole_run: Path, settings: Callable[..., FinetuneSettings]
) -> None:
    before = results(whole_run)
    with pytest.raises(ValueError, match="resume needs the same settings") as raised:
        finetune(settings(**changes), whole_run, resume=True)
    assert message in str(raised.value)
    assert results(whole_run) == before


def test_methods_and_seeds_are_added_to_a_finished_run(
    whole_run: Path, settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole_run, tmp_path / "run"))
    before = results(out / "head" / "seed0")
    finetune(settings(methods=("head", "tcur", "lora:rank=1"), seeds=2), out, resume=True)
    rows = read_csv(out / "metrics.csv")
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, seed) for method in ("head", "tcur", "lora:rank=1") for seed in ("0", "1")
    }
    assert results(out / "head" / "seed0") == before
    assert read_json(out / "run.json")["settings"]["methods"] == ["head", "tcur", "lora:rank=1"]
    with pytest.raises(ValueError, match="the run has seeds = 2, found 1 now"):
        finetune(settings(methods=("head", "tcur", "lora:rank=1")), out, resume=True)


def test_a_run_folder_in_use_is_not_written_to(
    whole_run: Path, settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    before = results(whole_run)
    with pytest.raises(ValueError, match="not empty; expected a new one, or --resume"):
        finetune(settings(), whole_run)
    assert results(whole_run) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for resume in (False, True):
        with pytest.raises(ValueError, match="mine"):
            finetune(settings(), tmp_path / "mine", resume=resume)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_loss_that_is_not_finite_is_an_error(pristine_data: Path, tmp_path: Path) -> None:
    config = NetworkConfig("vit", 1, 3, (16, 16, 16), None, {"hidden_size": 16, "mlp_dim": 32, "num_layers": 1,
                                                             "num_heads": 2, "features": 4})  # fmt: skip
    model = build_network(config)
    torch.nn.init.constant_(model.get_parameter("out.bias"), float("inf"))
    volumes = load_volumes(read_dataset(pristine_data).train, None)
    with pytest.raises(ValueError, match=r"loss of step 0 is .*expected a finite number"):
        train(model, volumes, Plan(2, 1, 1e-3, 0, (16, 16, 16)), tmp_path / "run")


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_bytes(path, b"good")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise Interrupted

    with pytest.raises(Interrupted):
        fail()
    assert path.read_bytes() == b"good"
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
