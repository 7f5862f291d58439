"""The comparison on hippocampus: which volumes are of one subject, and what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("monai")
pytest.importorskip("peft")

from tcurlora_ext.bench import comparison
from tcurlora_ext.bench.learned import Cases, Setting
from tcurlora_ext.bench.reading.comparison import comparison_table
from tcurlora_ext.bench.reading.tables import fill
from tcurlora_ext.io.records import read_json, write_csv, write_json
from tcurlora_ext.segmentation.comparing.settings import CompareSettings


def row(method: str, label: str, dice: float, hd95: float, trained: int, **more: object) -> dict[str, object]:
    empty = {"dice_sd": "", "step_ms": "", "step_mib": "", "seeds": 1, "adapter_bytes": 4000, "warm_up_steps": 0}
    return {
        "training_set": "five", "method": method, "label": label, "dice_mean": dice, "hd95_mm_mean": hd95,
        "trained_numbers": trained, **empty, **more,
    }  # fmt: skip


TABLE = [
    row("head", "mean", 0.6, 5.0, 4),
    row("tcur", "mean", 0.71, 3.4, 20),
    row("tcur", "front", 0.71, 3.4, 20),
    row("lora", "mean", 0.72, 3.2, 100, dice_sd=0.01, step_ms=12.3, step_mib=3.5, seeds=2),
]
TESTS = [
    {"training_set": "five", "measure": measure, "method": "tcur", "subjects": 9, "difference": value,
     "low": low, "high": high, "p_holm": 0.04}
    for measure, value, low, high in (("dice", -0.01, -0.02, 0.005), ("hd95_mm", 1.0, 0.5, 1.5))
]  # fmt: skip


def test_the_two_sides_are_of_one_subject_and_small_files_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, work = tmp_path / "target", tmp_path / "work"
    (target / "images").mkdir(parents=True)
    work.mkdir()
    for number in (1, 3, 4):
        (target / "images" / f"hippocampus_{number:03d}.nii.gz").touch()
    cases = Cases(target, "five", "val")
    setting = Setting(tmp_path / "base.safetensors", cases, cases, cases, {"head": 1e-3})
    monkeypatch.setattr(comparison, "hippocampus_setting", lambda *_: setting)
    started: list[CompareSettings] = []

    def compare(settings: CompareSettings, out: Path, display: object) -> None:
        started.append(settings)
        out.mkdir()
        values = {"data": str(settings.data), "pretrained": None, "methods": ["lora:init=/a/b.safetensors"]}
        write_json(out / "run.json", {"settings": values})
        for name in ("cases.csv", "parameters.png"):
            (out / name).touch()
        write_csv(out / "table.csv", TABLE)
        write_csv(out / "tests.csv", TESTS)

    monkeypatch.setattr(comparison, "compare", compare)
    words = ["--maps", "m", "--data", "d", "--name", "a", "--methods", "lora,tcur", "--shots", "five,3", "--lr"]
    assert comparison.main([str(work), str(tmp_path / "results"), *words, '{"tcur": 0.1}']) == 0
    (settings,) = started
    assert (settings.training_sets, settings.lr, settings.tune_over) == (("five", "3"), {"head": 1e-3, "tcur": 0.1}, ())
    assert settings.subject_file is not None
    found = read_json(settings.subject_file)
    assert found == {"hippocampus_001": "1", "hippocampus_003": "2", "hippocampus_004": "2"}
    published = tmp_path / "results" / "comparison-a"
    names = {*comparison.TABLES, "run.json", "summary.csv"}
    assert {path.name for path in published.iterdir()} == names
    text = fill("<!-- table: comparison summary.csv -->\n<!-- end -->\n", published)
    assert "| LoRA r=8 | 96 | 4.0 |  | 12 | 3.5 | 2 | 72.0 ± 1.0 | 3.20 |  |  |\n| paper's stacks r=8 | 16 |" in text
    assert "| - | - | 1 | 71.0 | 3.40 | -1.0 (-2.0 to +0.5) | 0.040 |\n| output head alone | 0 |" in text
    assert "`summary.csv`, measured by `python -m tcurlora_ext.bench.comparison`." in text
    run = read_json(published / "run.json")
    assert run["settings"] == {"data": "target", "pretrained": None, "methods": ["lora:init=b.safetensors"]}


def test_without_data_the_embedded_brains_are_compared_on_their_own_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = Cases(tmp_path / "target", "train", "val")
    setting = Setting(tmp_path / "base.safetensors", cases, cases, cases, {})
    networks: list[str] = []
    monkeypatch.setattr(comparison, "embedded_setting", lambda work, display, name: networks.append(name) or setting)
    started: list[CompareSettings] = []
    monkeypatch.setattr(comparison, "compare", lambda settings, *_, **__: started.append(settings))
    monkeypatch.setattr(comparison, "copy_results", lambda *_: None)
    monkeypatch.setattr(comparison, "summary", lambda _: TABLE)
    words = [str(tmp_path / "work"), str(tmp_path / "results"), "--network", "dynunet", "--name", "b"]
    assert comparison.main(words) == 0
    (settings,) = started
    assert (networks, settings.data, settings.subject_file) == (["dynunet"], cases.folder, None)
    assert (settings.training_sets, settings.val_list) == (("train",), "val")


def test_hippocampus_without_one_of_its_two_sources_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert comparison.main([str(tmp_path), str(tmp_path), "--maps", "m"]) != 0
    assert "expected both for hippocampus, or neither for the embedded brains" in capsys.readouterr().err


def test_a_table_of_several_training_sets_begins_with_their_cases() -> None:
    empty = dict.fromkeys(("subjects", "difference", "low", "high", "p_holm"), "")
    rows = [
        {name: str(value) for name, value in {**row(method, "mean", dice, 3.0, 10), **empty, **more}.items()}
        for method, dice, more in (
            ("tcur", 0.75, {"training_set": "20", "training_cases": 20}),
            ("head", 0.6, {"training_set": "10", "training_cases": 10}),
            ("tcur", 0.7, {"training_set": "10", "training_cases": 10}),
        )
    ]
    header, *lines = comparison_table(rows)
    assert header[:2] == ["training cases", "form"]
    assert [line[:2] for line in lines] == [
        ["10", "paper's stacks r=8"], ["10", "output head alone"], ["20", "paper's stacks r=8"]
    ]  # fmt: skip
