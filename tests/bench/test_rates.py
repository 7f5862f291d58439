"""The search of learning rates: equal trials on other cases, the best chosen, and what is there not run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("monai")
pytest.importorskip("peft")

from tcurlora_ext.bench import rates
from tcurlora_ext.bench.learned import Cases, Setting
from tcurlora_ext.io.records import write_csv
from tcurlora_ext.segmentation.methods import get_methods
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display

SETTING = Setting(
    Path("base.safetensors"), Cases(Path("t"), "five", "val"), Cases(Path("t"), "others", "val"),
    Cases(Path("t"), "choice", "choice_val"), {"head": 1e-3},
)  # fmt: skip


def test_each_method_has_three_trials_on_the_cases_to_choose_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[FinetuneSettings, Path]] = []

    def run(settings: FinetuneSettings, folder: Path, display: Display) -> None:
        started.append((settings, folder))
        (method,) = settings.methods
        folder.mkdir(parents=True)
        rate = settings.lr[method]
        write_csv(folder / "metrics.csv", [{"method": method, "dice": 0.7 - abs(rate - 0.01)}])
        (folder / "report.html").touch()

    monkeypatch.setattr(rates, "run_methods", run)
    rows = rates.search_rates(SETTING, ["head", "lora:rank=1", "hyps"], tmp_path, 7, Display())
    assert [(row["method"], row["lr"], row["chosen"]) for row in rows] == [
        ("lora:rank=1", 0.00333, 0), ("lora:rank=1", 0.01, 1), ("lora:rank=1", 0.03, 0),
        ("hyps", 0.000333, 0), ("hyps", 0.001, 0), ("hyps", 0.003, 1),
    ]  # fmt: skip
    assert rates.chosen_rates(rows) == {"lora:rank=1": 0.01, "hyps": 0.003}
    assert {(s.train_list, s.val_list, s.seeds, s.steps) for s, _ in started} == {("choice", "choice_val", 1, 7)}
    assert all(settings.lr["head"] == 1e-3 for settings, _ in started)
    assert started[0][1] == tmp_path / "0.333" / "lora_rank=1"

    assert rates.search_rates(SETTING, ["hyps", "lora:rank=1"], tmp_path, 7, Display())[3:] == rows[:3]
    assert len(started) == 6, "a run that is there was run again"


def test_a_head_without_a_rate_is_searched_first_and_its_best_rate_stands_beside_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, float]] = []

    def run(settings: FinetuneSettings, folder: Path, display: Display) -> None:
        started.append(dict(settings.lr))
        folder.mkdir(parents=True)
        (method,) = settings.methods
        write_csv(folder / "metrics.csv", [{"method": method, "dice": -settings.lr[method]}])

    monkeypatch.setattr(rates, "run_methods", run)
    setting = replace(SETTING, lr={})
    rows = rates.search_rates(setting, ["tcur", "head"], tmp_path, 7, Display(), (0.5, 0.25))
    head, tcur = (get_methods([name])[0].lr for name in ("head", "tcur"))
    assert started == [
        {"head": 0.5 * head}, {"head": 0.25 * head},
        {"head": 0.25 * head, "tcur": 0.5 * tcur}, {"head": 0.25 * head, "tcur": 0.25 * tcur},
    ]  # fmt: skip
    assert rates.chosen_rates(rows) == {"head": 0.25 * head, "tcur": 0.25 * tcur}
