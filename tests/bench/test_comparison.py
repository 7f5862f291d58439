"""The comparison on hippocampus: which volumes are of one subject, and what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("monai")
pytest.importorskip("peft")

from tcurlora_ext.bench import comparison
from tcurlora_ext.bench.learned import Cases, Setting
from tcurlora_ext.io.records import read_json, write_json
from tcurlora_ext.segmentation.comparing.settings import CompareSettings


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
        for name in (*comparison.TABLES, "parameters.png", "other.png"):
            (out / name).touch()

    monkeypatch.setattr(comparison, "compare", compare)
    words = ["--maps", "m", "--data", "d", "--name", "a", "--methods", "lora,tcur", "--shots", "five,3", "--lr"]
    assert comparison.main([str(work), str(tmp_path / "results"), *words, '{"tcur": 0.1}']) == 0
    (settings,) = started
    assert (settings.training_sets, settings.lr, settings.tune_over) == (("five", "3"), {"head": 1e-3, "tcur": 0.1}, ())
    assert settings.subject_file is not None
    found = read_json(settings.subject_file)
    assert found == {"hippocampus_001": "1", "hippocampus_003": "2", "hippocampus_004": "2"}
    published = tmp_path / "results" / "comparison-a"
    assert {path.name for path in published.iterdir()} == {*comparison.TABLES, "parameters.png", "run.json"}
    run = read_json(published / "run.json")
    assert run["settings"] == {"data": "target", "pretrained": None, "methods": ["lora:init=b.safetensors"]}
