"""A method whose loss is no longer finite: the others go on, and it can be tried again at another rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

pytest.importorskip("pandas")

from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.comparing.comparing import compare
from tcurlora_ext.segmentation.comparing.settings import CompareSettings
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import Diverged

NAN = {"norms": 1e30}  # whose second loss is NaN


def methods_of(path: Path) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in read_csv(path)))


def test_a_run_goes_on_without_it_and_tries_it_again(settings: Callable[..., FinetuneSettings], tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrong = settings(methods=("head", "norms", "bitfit"), seeds=2, steps=3, checkpoint_every=1, lr=NAN)
    with pytest.raises(Diverged, match=r"^norms: not in the tables; .*seed0: the loss of step \d is nan"):
        finetune(wrong, run)
    assert methods_of(run / "metrics.csv") == methods_of(run / "summary.csv") == ["head", "bitfit"]
    assert (run / "report.html").is_file()
    assert {path.name for path in (run / "norms" / "seed0").iterdir()} == {"metrics.csv"}
    assert not (run / "norms" / "seed1").exists()
    with pytest.raises(ValueError, match=r"lr\.head = 0\.1, found 0\.5 now"):
        finetune(replace(wrong, lr={"norms": 1e-3, "head": 0.5}), run, resume=True)
    rows = finetune(replace(wrong, lr={"norms": 1e-3}), run, resume=True)
    assert [row["method"] for row in rows] == ["head", "norms", "bitfit"]
    assert read_json(run / "norms" / "seed1" / "result.json")["lr"] == 1e-3


def test_where_all_methods_diverge_there_is_no_table(
    settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(Diverged, match="norms: not in the tables"):
        finetune(settings(methods=("norms",), steps=3, lr=NAN), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.csv").exists()


def test_a_comparison_goes_on_without_it_and_tries_it_again(
    settings: Callable[..., FinetuneSettings], tmp_path: Path
) -> None:
    small, out = settings(methods=("head", "norms"), seeds=1, steps=3, lr=NAN), tmp_path / "compare"
    values = {field.name: getattr(small, field.name) for field in fields(FinetuneSettings)}
    wanted = CompareSettings(**values | {"training_sets": ("1", "2"), "reference": "norms"})
    with pytest.raises(Diverged, match="norms: not in the tables"):
        compare(wanted, out)
    assert methods_of(out / "table.csv") == ["head"]
    assert {row["training_set"] for row in read_csv(out / "table.csv")} == {"1", "2"}
    rows = compare(replace(wanted, lr={"norms": 1e-3}), out)
    assert [row["method"] for row in rows if row["label"] == "mean"] == ["head", "norms"] * 2
    assert {row["reference"] for row in read_csv(out / "tests.csv")} == {"norms"}
