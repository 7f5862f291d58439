"""TensorBoard and MLflow: what is written to them, by packages that stand in for theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import loop
from tcurlora_ext.segmentation.training.plan import Plan

TENSORBOARD = """
import json, pathlib
class SummaryWriter:
    def __init__(self, log_dir):
        self.folder = pathlib.Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
    def add_scalar(self, tag, scalar_value, global_step):
        with (self.folder / "events").open("a") as file:
            file.write(json.dumps([tag, scalar_value, global_step]) + "\\n")
    def flush(self): pass
    def close(self): pass
"""
MLFLOW = """
import json, pathlib, types, urllib.parse
class MlflowClient:
    def __init__(self, tracking_uri):
        self.folder = pathlib.Path(urllib.parse.urlparse(tracking_uri).path)
        self.folder.mkdir(parents=True, exist_ok=True)
    def _write(self, run_id, *content):
        with (self.folder / run_id).open("a") as file:
            file.write(json.dumps(content) + "\\n")
    def get_experiment_by_name(self, name):
        path = self.folder / "experiment"
        if not path.is_file(): return None
        assert path.read_text() == name
        return types.SimpleNamespace(experiment_id="7")
    def create_experiment(self, name):
        (self.folder / "experiment").write_text(name)
        return "7"
    def create_run(self, experiment_id, run_name):
        assert experiment_id == "7"
        name = run_name.replace("/", "-")
        assert not (self.folder / name).exists()
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=name))
    def log_param(self, run_id, key, value): self._write(run_id, "param", key, value)
    def log_metric(self, run_id, key, value, step): self._write(run_id, key, value, step)
    def set_terminated(self, run_id): self._write(run_id, "end")
"""


class Stopped(Exception):
    pass


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages named tensorboard and mlflow, and torch's module for the first."""
    for name, content in (("tensorboard", ""), ("mlflow", MLFLOW), ("stand_in", TENSORBOARD)):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    import stand_in  # type: ignore[import-not-found]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    for name in ("tensorboard", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("packages")
def test_curves_are_written_to_both_and_a_resumed_training_goes_on_in_them(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    chosen = settings(methods=("head",), steps=5, select="best", select_every=2, log=("tensorboard", "mlflow"))
    schedule = loop.schedule

    def raise_at(plan: Plan, now: int) -> float:
        if now == 3:
            raise Stopped
        return schedule(plan, now)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "schedule", raise_at)
        with pytest.raises(Stopped):
            finetune(chosen, out)
    finetune(chosen, out, resume=True)
    expected = {
        (name, int(row["step"])): float(row[name])
        for row in read_csv(out / "head/seed0/metrics.csv")
        for name in ("loss", "lr", "val_dice", "select_dice")
        if row[name]
    }
    written = [json.loads(line) for line in (out / "tensorboard/head/seed0/events").read_text().splitlines()]
    assert {(name, step): value for name, value, step in written} == expected
    lines = [json.loads(line) for line in (out / "mlruns/head-seed0").read_text().splitlines()]
    assert {(line[0], line[2]): line[1] for line in lines if len(line) == 3 and line[0] != "param"} == expected
    assert ["param", "method", "head"] in lines
    assert ["param", "steps", "5"] in lines
    assert lines[-1] == ["end"]


def test_a_missing_package_is_named_before_anything_is_written(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else object())
    with pytest.raises(ValueError, match=r"the package 'tensorboard' is not installed.*pip install tensorboard"):
        finetune(settings(log=("tensorboard",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
