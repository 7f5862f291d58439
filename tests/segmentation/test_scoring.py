"""Scores by case, method and label: their values, their statistics, and the files and tables made of them."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import stats

from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.metrics.comparison import (
    MEASURES,
    case_values,
    compare_methods,
    holm,
    interval,
    summarise_scores,
    tables,
)
from tcurlora_ext.segmentation.prediction import PredictOptions, predict_scans
from tcurlora_ext.segmentation.prediction.predictor import load_predictor
from tcurlora_ext.segmentation.scoring.scorecard import EvaluateSettings, evaluate
from tcurlora_ext.segmentation.scoring.scoring import score_case

NAN = math.nan


def box(low: int, high: int) -> torch.Tensor:
    labels = torch.zeros(20, 20, 20, dtype=torch.int64)
    labels[low:high, 5:15, 5:15] = 1
    return labels


def test_scores_of_a_shifted_box() -> None:
    (row,) = score_case(box(7, 19), box(5, 15)[None], (2.0, 1.0, 1.0), {0: "background", 4: "box"})
    assert row["label"] == "box"
    assert row["dice"] == pytest.approx(2 * 8 / 22)
    assert row["hd95_mm"] == pytest.approx(8.0)
    assert (row["volume_mm3"], row["truth_mm3"], row["volume_error_mm3"]) == (2400, 2000, 400)
    assert row["volume_error_percent"] == pytest.approx(20.0)


def test_surface_dice_takes_one_millimetre_and_the_voxel_size() -> None:
    labels = {0: "background", 1: "box"}
    for spacing, least, most in (((0.5, 0.5, 0.5), 1.0, 1.0), ((2.0, 2.0, 2.0), 0.5, 0.9)):
        (row,) = score_case(box(7, 15), box(6, 15)[None], spacing, labels)  # one side a voxel off
        assert least <= row["surface_dice_1mm"] <= most
    (same,) = score_case(box(7, 15), box(7, 15)[None], (1.0, 1.0, 1.0), labels)
    assert (same["dice"], same["hd95_mm"], same["surface_dice_1mm"], same["volume_error_mm3"]) == (1, 0, 1, 0)


def test_a_class_that_the_truth_has_not_is_undefined_and_one_that_is_missed_is_zero() -> None:
    labels = {0: "background", 1: "box", 2: "nowhere"}
    missed, nowhere = score_case(torch.zeros(20, 20, 20), box(5, 15)[None], (1.0, 1.0, 1.0), labels)
    assert (missed["dice"], missed["surface_dice_1mm"], missed["volume_error_percent"]) == (0, 0, -100)
    assert math.isnan(missed["hd95_mm"])
    assert all(math.isnan(nowhere[key]) for key in ("dice", "hd95_mm", "surface_dice_1mm", "volume_error_percent"))
    _, found = score_case(2 * box(5, 15), box(5, 15)[None], (1.0, 1.0, 1.0), labels)
    assert math.isnan(found["dice"])
    assert found["volume_error_mm3"] == 1000


def test_holms_correction_against_an_example_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, NAN, 0.005]) == pytest.approx([0.03, 0.06, 0.06, NAN, 0.02], nan_ok=True)
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_is_scipys_bootstrap_and_repeatable() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 40).tolist()
    low, high = interval(values)
    error = 1.96 * np.std(values) / math.sqrt(len(values))
    assert (low, high) == interval(values)
    assert low == pytest.approx(np.mean(values) - error, abs=0.005)
    assert high == pytest.approx(np.mean(values) + error, abs=0.005)
    assert interval([0.5] * 5) == interval([0.5, 0.5], fewest=2) == (0.5, 0.5)
    assert all(math.isnan(end) for end in (*interval([0.5] * 4), *interval([0.5], fewest=1)))


def rows_of(dice: dict[str, list[list[float]]], labels: tuple[str, ...] = ("a", "b")) -> list[dict[str, object]]:
    """Rows of scores.csv: for each method the Dice of every case, a list over labels."""
    return [
        {"method": method, "seed": 0, "case": f"case{case}", "label": label, "dice": value, "hd95_mm": 10 * value,
         "surface_dice_1mm": value, "volume_mm3": 1.0, "truth_mm3": 1.0, "volume_error_mm3": -value,
         "volume_error_percent": -100 * value}
        for method, cases in dice.items()
        for case, values in enumerate(cases)
        for label, value in zip(labels, values, strict=True)
    ]  # fmt: skip


def test_means_are_over_seeds_then_labels_then_cases() -> None:
    rows = rows_of({"x": [[0.2, 0.4], [0.6, NAN], [NAN, NAN]]})
    rows += [{**row, "seed": 1, "dice": row["dice"] + 0.2} for row in rows]  # type: ignore[operator]
    values = case_values(rows, "dice")
    assert values["x", "a"] == pytest.approx({"case0": 0.3, "case1": 0.7, "case2": NAN}, nan_ok=True)
    assert values["x", "mean"] == pytest.approx({"case0": 0.4, "case1": 0.7, "case2": NAN}, nan_ok=True)
    summary = {(row["label"], row["measure"]): row for row in summarise_scores(rows)}
    assert summary["mean", "dice"]["cases"] == 2
    assert summary["mean", "dice"]["mean"] == pytest.approx(0.55)
    assert summary["a", "volume_error_percent"]["mean"] == pytest.approx(40)  # of absolute values


def test_methods_are_compared_over_the_cases_that_both_have() -> None:
    rng = np.random.default_rng(1)
    first = rng.uniform(0.5, 0.8, 12)
    dice = {"x": first, "y": first - rng.uniform(0.01, 0.05, 12), "z": first}
    rows = rows_of({name: [[value] for value in values] for name, values in dice.items()}, ("a",))
    rows[0]["dice"] = NAN
    found = {(row["method"], row["other"]): row for row in compare_methods(rows) if row["measure"] == "dice"}
    assert list(found) == [("x", "y"), ("x", "z"), ("y", "z")]
    pair = found["x", "y"]
    differences = (dice["x"] - dice["y"])[1:]
    assert pair["cases"] == 11
    assert pair["difference"] == pytest.approx(differences.mean())
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["low"] > 0
    assert pair["p"] == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert pair["p_holm"] == pytest.approx(2 * pair["p"])  # y and z have 12 cases and the smallest p
    assert (found["x", "z"]["difference"], found["x", "z"]["p"]) == (0, 1)


def test_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("head", "decoder", "a folder of label maps with a long name")
    labels = ("right inferior temporal gyrus", "left")
    rng = np.random.default_rng(0)
    rows = rows_of({name: rng.uniform(0, 1, (9, 2)).tolist() for name in names}, labels)
    for row in rows:
        row["hd95_mm"] = 123.456
    text = "\n".join(tables(summarise_scores(rows), compare_methods(rows)))
    assert max(map(len, text.splitlines())) <= 80
    for heading, _, _ in MEASURES.values():
        assert heading in text
    assert "too few" not in text
    assert "right…oral gyrus" in text
    one = rows_of({name: [[0.5, 0.6]] for name in names}, labels)  # a single case has no interval
    text = "\n".join(tables(summarise_scores(one), compare_methods(one)))
    assert "- to -" not in text
    assert "fewer than 5 cases are too few for an interval" in text


def test_of_many_methods_the_table_compares_with_one() -> None:
    names = ("head", "tcur", "lora", "tcur:rank=2", "tcur:rank=4")
    rows = rows_of({name: [[0.5, 0.6], [0.7, 0.1 * index]] for index, name in enumerate(names)}, ("x", "y"))
    text = tables(summarise_scores(rows), compare_methods(rows))[-1]
    lines = [line for line in text.splitlines() if "Dice %" in line and "surface" not in line.lower()]
    assert len(lines) == 4
    assert all("lora" in line for line in lines)
    count = 4 * len(MEASURES)
    assert text.endswith(f"\n{count} of {10 * len(MEASURES)} comparisons; all are in scores.json")


def test_evaluate_gives_the_scores_that_the_run_took(finished_run: Path, tmp_path: Path) -> None:
    result = evaluate(EvaluateSettings(finished_run), tmp_path / "out")
    rows = read_csv(tmp_path / "out/scores.csv")
    assert len(rows) == 2 * 2 * 2 * 2  # methods, seeds, cases, labels
    for method, seed in itertools.product(("head", "tcur"), "01"):
        own = {row["case"]: row for row in read_csv(finished_run / method / f"seed{seed}" / "cases.csv")}
        for row in rows:
            if (row["method"], row["seed"]) == (method, seed):
                for key in ("dice", "hd95_mm"):
                    expected = float(own[row["case"]][f"{key} {row['label']}"])
                    assert float(row[key]) == pytest.approx(expected, nan_ok=True, abs=1e-6)
    written = json.loads((tmp_path / "out/scores.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written["cases"] == result["cases"] == ["case_003", "case_004"]
    assert written["source"].endswith("the run's validation cases")
    assert {(row["method"], row["other"]) for row in written["comparisons"]} == {("head", "tcur")}
    with pytest.raises(ValueError, match=r"scores\.csv: the file exists; expected another folder, or --overwrite"):
        evaluate(EvaluateSettings(finished_run), tmp_path / "out")
    evaluate(EvaluateSettings(finished_run, method="head", seed="1"), tmp_path / "out", overwrite=True)
    assert {(row["method"], row["seed"]) for row in read_csv(tmp_path / "out/scores.csv")} == {("head", "1")}


def test_label_maps_written_by_predict_get_the_same_scores(
    finished_run: Path, pristine_data: Path, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    scans = [pristine_data / "imagesTr" / f"case_00{index}.nii.gz" for index in (3, 4)]
    predict_scans(load_predictor(finished_run), scans, maps, PredictOptions(overlays=False))
    evaluate(EvaluateSettings(finished_run, predictions=(maps,), method="tcur", seed="0"), tmp_path / "out")
    by_method: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader((tmp_path / "out/scores.csv").open()):
        by_method.setdefault(row.pop("method"), []).append({key: row[key] for key in row if key != "seed"})
    assert by_method["tcur"] == by_method["maps"]
    # without a run: its own folder, all cases that have a label map, the classes of dataset.json
    result = evaluate(EvaluateSettings(data=pristine_data, predictions=(maps,)))
    assert result["source"].endswith("2 of 5 labelled cases, those that have a label map")
    assert (maps / "evaluation/scores.csv").is_file()
    assert result["comparisons"] == []


def test_a_perfect_prediction_with_values_that_have_gaps(tmp_path: Path) -> None:
    data = tmp_path / "data"
    voxels = np.zeros((12, 10, 8), np.uint8)
    voxels[2:6, 2:6, 2:6], voxels[6:9, 2:6, 2:6] = 3, 9
    for folder, values in (("images", np.random.default_rng(0).normal(size=voxels.shape)), ("labels", voxels)):
        (data / folder).mkdir(parents=True)
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, 2, 1, 1])), data / folder / "a.nii.gz")
    result = evaluate(EvaluateSettings(data=data, predictions=(data / "labels",)), tmp_path / "out")
    assert result["labels"] == {"0": "background", "3": "label 3", "9": "label 9"}
    assert {row["mean"] for row in result["summary"] if row["measure"] in ("dice", "surface_dice_1mm")} == {1}
    rows = read_csv(tmp_path / "out/scores.csv")
    assert [float(row["volume_mm3"]) for row in rows] == [128, 96]


def test_what_cannot_be_scored_is_named_and_nothing_is_written(
    finished_run: Path, pristine_data: Path, data: Path, tmp_path: Path
) -> None:
    maps, out = tmp_path / "maps", tmp_path / "out"
    shutil.copytree(data / "labelsTr", maps)
    other = nib.load(maps / "case_001.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(other.dataobj), np.diag([2, 2, 3, 1])), maps / "case_001.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange").mkdir()
    shutil.copy(maps / "case_000.nii.gz", tmp_path / "strange/a.nii.gz")
    (tmp_path / "file").touch()
    cases: list[tuple[EvaluateSettings, Path, type[Exception], str]] = [
        (EvaluateSettings(), out, ValueError, "found neither a run folder nor --predictions"),
        (EvaluateSettings(predictions=(maps,)), out, ValueError, "data: found none"),
        (EvaluateSettings(data=tmp_path / "no", predictions=(maps,)), out, FileNotFoundError, "no: no such folder"),
        (EvaluateSettings(data=data, predictions=(maps,)), out, ValueError, "case_001.nii.gz: found another affine"),
        (EvaluateSettings(data=data, predictions=(tmp_path / "empty",)), out, ValueError, "empty: found no label map"),
        (
            EvaluateSettings(data=data, predictions=(tmp_path / "strange",)),
            out,
            ValueError,
            "0 of 5 labelled cases.*: found a in .*strange, expected names as those of the cases, such as case_000",
        ),
        (EvaluateSettings(data=data, predictions=(maps, maps)), out, ValueError, "has the name of"),
        (EvaluateSettings(finished_run, case_list="test"), out, ValueError, "found no list 'test'"),
        (EvaluateSettings(finished_run, method="lora"), out, ValueError, "'lora' was not part of it"),
        (EvaluateSettings(finished_run, overlap=-1), out, ValueError, "overlap: found -1"),
        (EvaluateSettings(finished_run), tmp_path / "file", ValueError, "file: found a file, expected a folder"),
        (EvaluateSettings(tmp_path / "empty"), out, FileNotFoundError, "found no run.json"),
    ]
    for settings, folder, error, message in cases:
        with pytest.raises(error, match=message):
            evaluate(settings, folder)
    (maps / "case_001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"case_001\.nii\.gz: no such file; expected the label map of this"):
        evaluate(EvaluateSettings(data=data, predictions=(maps,), case_list="all"), out)
    names = read_json(data / "dataset.json")
    names["labels"]["1"] = "another"
    (data / "dataset.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"found the classes .*another.*, expected .*front"):
        evaluate(EvaluateSettings(finished_run, data), out)
    assert not out.exists()


def test_cases_that_the_run_was_trained_on_are_a_warning(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tcurlora_ext.io.table import terminal
    from tcurlora_ext.segmentation.terminal import Display

    settings = EvaluateSettings(finished_run, case_list="all", method="head", seed="0")
    evaluate(settings, tmp_path / "out", display=Display(terminal()))
    text = capsys.readouterr().out
    assert "warning: 3 of these cases have the names of cases that the run was trained on (case_000, ...)" in text
    assert "[5/5] head, seed 0, case_004: Dice front " in text
