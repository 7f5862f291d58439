"""Comparisons in miniature: what is run and what is not, the tables, the tests over subjects, wrong settings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")

import numpy as np
from rich.console import Console
from typer.testing import CliRunner, Result

from tcurlora_ext.cli.app import app
from tcurlora_ext.io.records import read_csv, read_json, write_json
from tcurlora_ext.segmentation.comparing import comparing
from tcurlora_ext.segmentation.comparing.comparing import compare
from tcurlora_ext.segmentation.comparing.settings import CompareSettings, with_earlier
from tcurlora_ext.segmentation.dataset import synthetic
from tcurlora_ext.segmentation.runs import adapting
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.terminal import Display
from tcurlora_ext.segmentation.training import loop

SIZES = {"hidden_size": 16, "mlp_dim": 32, "num_layers": 1, "num_heads": 2, "features": 4}
TABLES = ("table.csv", "cases.csv", "tests.csv")


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def chosen(settings: Callable[..., FinetuneSettings]) -> CompareSettings:
    """Two methods on one and on two of three subjects, two steps each."""
    small = settings(steps=2, checkpoint_every=1)
    values = {field.name: getattr(small, field.name) for field in fields(FinetuneSettings)}
    return CompareSettings(**values | {"seeds": 2, "training_sets": ("1", "2")})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pristine_data: Path, base: Path) -> Path:
    """A finished comparison with the settings of `chosen`, measured; tests do not change it."""
    out = tmp_path_factory.mktemp("compare") / "whole"
    done = command(
        "compare", "--output", out, "--data", pristine_data, "--pretrained", base, "--methods", "head,tcur", "--shots",
        "1,2", "--seeds", 2, "--steps", 2, "--rank", 4, "--lora-rank", 2, "--checkpoint-every", 1, "--measure",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (out / "said.txt").write_text(done.output)
    return out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Which training sets, methods and seeds have been trained."""
    found: list[tuple[str, str, int]] = []
    fit = adapting.fit

    def noted(job: Any, method: Any, choice: Any, seed: int, *rest: Any, **named: Any) -> Any:
        found.append((job.out.name, method.name, seed))
        return fit(job, method, choice, seed, *rest, **named)

    monkeypatch.setattr(adapting, "fit", noted)
    return found


def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "compare"))


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def test_repeated_it_trains_nothing_and_writes_the_same_tables(
    whole: Path, tmp_path: Path, trained: list[Any], pristine_data: Path
) -> None:
    out = copied(whole, tmp_path)
    before = contents(out)
    for name in TABLES:
        (out / name).unlink()
    done = command("compare", "--resume", out)
    assert done.exit_code == 0, done.output
    assert (trained, contents(out)) == ([], before)


def test_the_tables_and_the_report_have_every_method_and_training_set(whole: Path) -> None:
    rows = read_csv(whole / "table.csv")
    keys = [(row["training_set"], row["method"], row["label"]) for row in rows]
    assert keys == [(s, m, label) for s in "12" for m in ("head", "tcur") for label in ("mean", "front", "back")]
    assert {(row["training_set"], row["training_cases"]) for row in rows} == {("1", "1"), ("2", "2")}
    for row in rows:
        seeds = [
            read_json(whole / row["training_set"] / row["method"] / f"seed{seed}" / "result.json") for seed in (0, 1)
        ]
        suffix = "" if row["label"] == "mean" else f" {row['label']}"
        dice = [result[f"dice{suffix}"] for result in seeds]
        assert float(row["dice_mean"]) == pytest.approx(np.mean(dice), nan_ok=True)
        assert float(row["dice_sd"]) == pytest.approx(np.std(dice, ddof=1), nan_ok=True)
        assert int(row["trained_numbers"]) == seeds[0]["trained_numbers"]
        assert float(row["step_ms"]) > 0
        assert float(row["step_mib"]) > 0
        assert (row["seeds"], row["steps"], row["warm_up_steps"], row["gpu_peak_mib"]) == ("2", "2", "0", "")
    cases = read_csv(whole / "cases.csv")
    assert len(cases) == 2 * 2 * 2 * 2
    assert {row["subject"] for row in cases} == {"case_003", "case_004"}
    tests = read_csv(whole / "tests.csv")
    assert [(t["training_set"], t["measure"], t["method"], t["reference"]) for t in tests] == [
        (s, measure, "tcur", "head") for s in "12" for measure in ("dice", "hd95_mm")
    ]
    text = (whole / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert text.count("data:image/png;base64") == 6
    for title in ("1 training subject (1 case)", "2 training subjects (2 cases)"):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<td class=l>tcur</td>") >= 2
    said = (whole / "said.txt").read_text()
    assert "2 subjects are too few for an interval" in said
    tables = said[said.index("1 training subject") :].partition("table:")[0]
    assert max(len(line.rstrip()) for line in tables.splitlines() if "Trained on" not in line) <= 80


def test_what_is_measured_side_by_side_stands_in_the_table(whole: Path) -> None:
    steps = {row["method"]: row for row in read_csv(whole / "steps.csv")}
    assert set(steps) == {"head", "tcur"}
    for row in read_csv(whole / "table.csv"):
        assert float(row["step_ms"]) == float(steps[row["method"]]["step_ms"])
        result = read_json(whole / row["training_set"] / row["method"] / "seed0" / "result.json")
        assert float(row["step_mib"]) == result["step_mib"]  # as in the training
    assert float(steps["tcur"]["step_mib"]) > float(steps["head"]["step_mib"])


def test_fewer_subjects_are_among_more(whole: Path) -> None:
    one, two = (set(read_json(whole / name / "run.json")["data"]["train"]) for name in "12")
    assert (len(one), len(two)) == (1, 2)
    assert one < two


def test_only_what_is_missing_is_run(
    whole: Path, tmp_path: Path, trained: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(whole, tmp_path)
    (out / "2" / "tcur" / "seed1" / "result.json").unlink()
    done = command("compare", "--resume", out, "--methods", "norms")
    assert done.exit_code == 0, done.output
    assert trained == [
        ("1", "norms", 0), ("1", "norms", 1), ("2", "norms", 0), ("2", "tcur", 1), ("2", "norms", 1)
    ]  # fmt: skip
    rows = read_csv(out / "cases.csv")
    assert {row["method"] for row in rows} == {"head", "tcur", "norms"}
    assert [row for row in rows if row["method"] != "norms"] == read_csv(whole / "cases.csv")
    started: list[tuple[str, int]] = []
    monkeypatch.setattr(
        comparing, "finetune", lambda settings, folder, **_: started.append((folder.name, settings.seeds))
    )
    for words, expected in ((("--shots", "one"), [("one", 2)]), (("--seeds", 3), [(name, 3) for name in "12"])):
        done = command("compare", "--resume", copied(whole, tmp_path / words[0]), *words)
        assert "no such file" in done.stderr  # as nothing has been trained
        assert [started.pop(0) for _ in expected] == expected
    assert started == []


def test_the_first_command_again_keeps_what_was_added(
    whole: Path, tmp_path: Path, chosen: CompareSettings, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(whole, tmp_path)
    compare(replace(chosen, methods=("head", "norms"), seeds=3, training_sets=("one",)), out)
    trained.clear()
    capsys.readouterr()
    settings, more = with_earlier(replace(chosen, lr={"tcur": 0.5}), out)
    assert (settings.methods, settings.training_sets, settings.seeds) == (
        ("head", "tcur", "norms"),
        ("1", "2", "one"),
        3,
    )
    assert more == "method norms, training set one, 3 seeds"
    with pytest.raises(ValueError, match=r"lr\.tcur = 0\.01, found 0\.5 now"):
        compare(replace(chosen, lr={"tcur": 0.5}), out)
    rows = compare(replace(chosen, seeds=1), out, display=Display(Console(width=200)))
    assert trained == []
    assert "method norms, training set one, 3 seeds" in capsys.readouterr().out
    means = [(row["training_set"], row["method"], row["seeds"]) for row in rows if row["label"] == "mean"]
    assert means == [(name, method, 3) for name in ("one", "1", "2") for method in ("head", "tcur", "norms")]


class Stopped(Exception):
    pass


def test_an_interrupted_comparison_has_the_scores_of_an_uninterrupted_one(
    whole: Path, tmp_path: Path, chosen: CompareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, saves = tmp_path / "compare", loop.checkpoints.save, iter(range(9))
    one = replace(chosen, training_sets=("2",), seeds=1)

    def stops(*values: Any) -> None:
        save(*values)
        if next(saves) == 2:  # the first of the second method
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(loop.checkpoints, "save", stops)
        with pytest.raises(Stopped):
            compare(one, out)
    assert (out / "2" / "tcur" / "seed0" / "checkpoint.pt").is_file()
    compare(one, out)
    expected = [row for row in read_csv(whole / "cases.csv") if (row["training_set"], row["seed"]) == ("2", "0")]
    assert read_csv(out / "cases.csv") == expected


def test_a_run_of_finetune_is_taken_over_without_what_it_has_not_measured(
    tmp_path: Path, chosen: CompareSettings, settings: Callable[..., FinetuneSettings], trained: list[Any]
) -> None:
    out = tmp_path / "compare"
    finetune(settings(steps=2, methods=("head", "tcur", "norms"), seeds=1, train_list="one"), out / "one")
    for path in out.glob("one/*/seed0/result.json"):  # as an earlier version writes it
        old = {k: v for k, v in read_json(path).items() if k not in adapting.COST}
        write_json(path, old)
    description = read_json(out / "one" / "run.json")
    del description["settings"]["shots"]
    write_json(out / "one" / "run.json", description)
    trained.clear()
    wanted = replace(chosen, training_sets=("one",), seeds=1, checkpoint_every=2)
    rows = compare(wanted, out)
    assert trained == []
    assert {row["method"] for row in rows} == {"head", "tcur"}
    assert {row["step_ms"] for row in rows} == {""}
    assert "time.png" not in {path.name for path in out.iterdir()}
    with pytest.raises(ValueError, match="the run has steps = 2, found 3 now"):
        compare(replace(wanted, steps=3), out)
    shutil.rmtree(out / "one")
    (out / "notes.txt").write_text("mine")
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match=r"found no run\.json"):
        compare(wanted, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "lora"}, "reference: found 'lora', expected one of the methods head, tcur"),
        ({"training_sets": ("4",)}, "shots: found 4, expected 1 to 3, the number of training subjects"),
        ({"training_sets": ("0",)}, "shots: found 0, expected 1 to 3"),
        ({"training_sets": ("1", "01")}, "shots: found '1,01', expected each once"),
        ({"training_sets": ("one", "one")}, "shots: found 'one,one', expected each once"),
        ({"training_sets": ("",)}, "shots: found '', expected numbers of subjects or names of lists"),
        ({"training_sets": ("five",)}, "found no list 'five', expected one of"),
        ({"training_sets": ("few/one", "few_one")}, "expected each once"),
        ({"training_sets": ("1", "2"), "fold": 0, "train_list": "train"}, "for fold 0"),
        ({"training_sets": ("one",), "fold": 0}, "shots: found 'one' beside fold 0"),
        ({"methods": ("head", "lore")}, "method: found 'lore'"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(
    changes: dict[str, Any], message: str, chosen: CompareSettings, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        compare(replace(chosen, **changes), tmp_path / "compare")
    assert not (tmp_path / "compare").exists()


def test_the_embedded_data_are_made_once_for_all_training_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    make = synthetic.make_subject
    monkeypatch.setattr(synthetic, "make_subject", lambda *key: make(*key[:3], spacing=8.0))
    small = CompareSettings(
        methods=("head",), subjects=(2, 1), source_subjects=(1, 1), sizes=SIZES, roi=(16, 16, 16), steps=1,
        pretrain_steps=1, training_sets=("all", "1"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="shots: found 3, expected 1 to 2"):
        compare(replace(small, training_sets=("3",)), tmp_path / "compare")
    rows = compare(small, tmp_path / "compare")
    assert [row["training_set"] for row in rows if row["label"] == "mean"] == ["1", "all"]
    assert not list((tmp_path / "compare").glob("*/pretrain"))
    bases = [read_json(tmp_path / "compare" / name / "run.json")["base"]["sha256"] for name in ("1", "all")]
    assert bases[0] == bases[1]


def test_a_file_of_subjects_says_which_cases_belong_together(whole: Path, tmp_path: Path) -> None:
    out, path = copied(whole, tmp_path), tmp_path / "subjects.json"
    path.write_text(json.dumps({"case_003": "a"}))
    done = command("compare", "--resume", out, "--subject-file", path)
    assert done.exit_code == 2
    assert "found no subject of the case case_004" in done.stderr
    assert read_json(out / "run.json")["settings"]["subject_file"] is None
    assert command("compare", "--resume", out, "--subject-file", path, "--methods", "norms").exit_code == 2
    assert not list(out.glob("*/norms"))  # found before anything is trained
    path.write_text(json.dumps({"case_003": "a", "case_004": "a"}))
    assert command("compare", "--resume", out, "--subject-file", path).exit_code == 0
    assert {row["subjects"] for row in read_csv(out / "tests.csv")} == {"1"}
    path.write_text("[1]")
    assert "expected the subject of each case" in command("compare", "--resume", out, "--subject-file", path).stderr


def test_the_command_takes_the_options_of_finetune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[CompareSettings, Path]] = []
    monkeypatch.setattr(comparing, "compare", lambda settings, out, *, display: calls.append((settings, out)))
    options = tmp_path / "options.json"
    options.write_text(json.dumps({"methods": ["head", "tcur"], "shots": [5, 10], "amp": "bf16", "lr": 0.1}))
    words = ("--tune", "--trials", 5, "--seeds", 3, "--reference", "head", "--data", "d", "--pretrained", "p")
    done = command("compare", "--config", options, "--output", tmp_path / "out", *words)
    assert (done.exit_code, done.stderr) == (0, "")
    assert calls == [
        (
            CompareSettings(
                data=Path("d"), pretrained=Path("p"), methods=("head", "tcur"), training_sets=("5", "10"), amp="bf16",
                lr={"head": 0.1, "tcur": 0.1}, tune=True, trials=5, seeds=3, reference="head",
            ),
            tmp_path / "out",
        )
    ]  # fmt: skip
