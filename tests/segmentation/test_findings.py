"""The result of a run in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tcurlora_ext.io.records import write_csv
from tcurlora_ext.segmentation.report.findings import case_dice, result_sentence


def write(out: Path, scores: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The cases.csv of methods: for each seed the Dice of every case, of which a second class has 0.1 less."""
    for method, seeds in scores.items():
        for seed, values in enumerate(seeds):
            rows = [
                {"case": f"c{index}", "dice a": value, "dice b": value - 0.1, "hd95_mm a": 1.0}
                for index, value in enumerate(values)
            ]
            write_csv(out / method / f"seed{seed}" / "cases.csv", rows)


def test_it_is_about_tcur_beside_the_head_and_lora(tmp_path: Path) -> None:
    tcur = [[0.75, 0.85, 0.95, 0.85, 0.85], [0.77, 0.87, 0.97, 0.87, 0.87]]
    head, lora = [[0.85, 0.85, 0.85, 0.85, 0.85]], [[0.65, 0.75, 0.85, 0.75, 0.80]]
    write(tmp_path, {"head": head, "lora": lora, "tcur": tcur})
    assert case_dice(tmp_path, "tcur") == pytest.approx({"c0": 0.71, "c1": 0.81, "c2": 0.91, "c3": 0.81, "c4": 0.81})
    assert result_sentence(tmp_path, ["head", "lora", "tcur"]) == (
        "On 5 scans that it was not trained on, the network adapted by tcur agrees with the reference labels to "
        "81.0 % (Dice overlap, 95 % interval 75.0 to 87.0): 1.0 points more than head (-5.0 to 7.0; may be chance) and "
        "10.0 points more than lora (8.0 to 11.0)."
    )


def test_few_scans_have_no_interval(tmp_path: Path) -> None:
    write(tmp_path, {"full": [[0.8]], "decoder": [[0.9]], "norms": [[0.8, 0.7, 0.6]], "tcur": [[0.7, 0.5, 0.3]]})
    assert result_sentence(tmp_path, ["full", "decoder"]) == (
        "On 1 scan that it was not trained on, the network adapted by full agrees with the reference labels to 75.0 % "
        "(Dice overlap; 1 scan is too few for an interval): 10.0 points less than decoder."
    )
    assert result_sentence(tmp_path, ["norms", "tcur"]).endswith(
        "(Dice overlap; 3 scans are too few for an interval): 20.0 points less than norms."
    )


def test_a_warm_up_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"tcur-learned": [[0.8, 0.7]], "lora-sb": [[0.6, 0.7]]})
    text = result_sentence(tmp_path, ["tcur-learned", "lora-sb"], {"tcur-learned": 120, "lora-sb": 1})
    assert "adapted by tcur-learned (after a warm-up of 120 steps) agrees" in text
    assert "more than lora-sb (after a warm-up of 1 step)" in text


def test_scans_without_a_structure_have_no_score(tmp_path: Path) -> None:
    write(tmp_path, {"tcur": [[float("nan")]]})
    assert "there is no score" in result_sentence(tmp_path, ["tcur"])
