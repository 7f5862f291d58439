"""The bench of a small language model: its texts, its loop, and its table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tcurlora_ext.bench import language
from tcurlora_ext.bench.reading.language import NEW, language_table
from tcurlora_ext.io.records import read_csv

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_texts_are_the_same_each_time_and_training_and_test_do_not_overlap() -> None:
    text = language.code_of("networkx")
    assert (len(text.train), len(text.test)) == (language.TRAIN_BYTES, language.TEST_BYTES)
    assert torch.equal(text.test, language.code_of("networkx").test)
    assert bytes(text.test[:200].tolist()) not in bytes(text.train.tolist())
    assert language.docstrings('"""One."""\ndef f():\n    """Two."""\n') == "One.\n\nTwo."
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed"):
        next(language.read_files("no_such_package", ".py"))


def test_every_form_is_run_once_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(language, "SIZES", language.SIZES | SMALL)
    monkeypatch.setattr(language, "RATES", (1e-3, 1e-2))
    for name, size in (("TRAIN_BYTES", 2048), ("TEST_BYTES", 1024), ("FAMILY_BYTES", 2048), ("FAMILY_STEPS", 3)):
        monkeypatch.setattr(language, name, size)
    monkeypatch.setattr(language, "WARM_UP", 2)
    monkeypatch.setattr(language, "first_bytes", _short(language.first_bytes))
    arguments = [str(tmp_path / "work"), str(tmp_path), "--seeds", "2", "--steps", "2", "--pretrain-steps", "2"]
    assert language.main(arguments) == 0, capsys.readouterr().err
    rows = read_csv(tmp_path / "language.csv")
    forms = {row["form"] for row in rows}
    assert {"base, not adapted", "LoRA r=8", "paper's stacks r=8", "learned r=8", "carried r=4"} < forms
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    trained = {row["form"]: int(row["trained_parameters"]) for row in rows}
    assert trained["base, not adapted"] == 0 < trained["carried r=4"] < trained["LoRA r=1"] < trained["LoRA r=8"]
    monkeypatch.setattr(language, "run", None)  # all of it is there
    assert language.main(arguments) == 0
    assert read_csv(tmp_path / "language.csv") == rows
    table = language_table(rows)
    assert all(len(line) == len(table[0]) for line in table)
    assert {line[4] for line in table[1:]} == {"1", "2"}
    assert {row["text"] for row in rows} == {NEW, language.CHOICE}


def _short(whole: object) -> object:
    """Of the pretraining text, some kilobytes are enough."""
    return lambda parts, count: whole(parts, min(count, 4096))  # type: ignore[operator]
