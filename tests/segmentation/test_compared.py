"""What a comparison makes of scores: tests over subjects, its sentence, cells of tables, figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")

import numpy as np
from scipy.stats import wilcoxon

from tcurlora_ext.segmentation.comparing import figures
from tcurlora_ext.segmentation.comparing.figures import short_names
from tcurlora_ext.segmentation.comparing.findings import comparison_sentence
from tcurlora_ext.segmentation.comparing.labels import spread
from tcurlora_ext.segmentation.comparing.page import title_of
from tcurlora_ext.segmentation.comparing.settings import Part
from tcurlora_ext.segmentation.comparing.testing import against_reference, subject_scores
from tcurlora_ext.segmentation.metrics.comparison import holm, paired, rank_biserial
from tcurlora_ext.segmentation.report.cells import in_lines, number, with_sd
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings


def scored(dice: dict[str, list[float]], seeds: int = 1) -> list[dict[str, Any]]:
    """Rows of cases.csv: two labels that differ by 0.2 around a method's Dice; subject a has the first two cases."""
    return [
        {"training_set": "5", "method": method, "seed": seed, "case": f"c{index}", "subject": "aabcdefgh"[index],
         "dice x": value - 0.1 + shift, "dice y": value + 0.1 + shift, "hd95_mm x": 1.0, "hd95_mm y": math.nan}
        for method, values in dice.items()
        for seed in range(seeds)
        for shift in [0.02 * (2 * seed - seeds + 1)]
        for index, value in enumerate(values)
    ]  # fmt: skip


def test_scores_are_means_over_labels_seeds_and_cases_of_a_subject() -> None:
    rows = scored({"lora": [0.5, 0.7, 0.8]}, seeds=3)
    assert subject_scores(rows, "5", "lora", "dice") == pytest.approx({"a": 0.6, "b": 0.8})
    assert subject_scores(rows, "5", "lora", "hd95_mm") == {"a": 1.0, "b": 1.0}


def test_methods_are_tested_against_the_reference_over_subjects() -> None:
    base = [0.5, 0.7, 0.6, 0.8, 0.7, 0.75, 0.65]
    more = [0.01, 0.03, 0.03, -0.01, 0.04, 0.05, 0.06]  # subjects: 0.02, 0.03, -0.01, 0.04, 0.05, 0.06
    rows = scored({
        "lora": base, "tcur": [a + b for a, b in zip(base, more, strict=True)], "same": base,
        "head": [value - 0.2 - 0.001 * index for index, value in enumerate(base)],
    })  # fmt: skip
    found = {row["method"]: row for row in against_reference(rows, "lora") if row["measure"] == "dice"}
    assert list(found) == ["tcur", "same", "head"]
    tcur = found["tcur"]
    differences = [0.02, 0.03, -0.01, 0.04, 0.05, 0.06]
    assert tcur["subjects"] == 6
    assert tcur["difference"] == pytest.approx(np.mean(differences))
    # by hand: the rank sum is 21, of which 1 belongs to the one difference below 0; 2 of 64 signs are as far out twice
    assert tcur["rank_biserial"] == pytest.approx(19 / 21)
    assert tcur["p"] == pytest.approx(4 / 64)
    assert tcur["p"] == pytest.approx(wilcoxon(differences).pvalue)
    assert (found["same"]["p"], found["same"]["difference"]) == (1.0, 0.0)
    assert math.isnan(found["same"]["rank_biserial"])
    assert found["head"]["rank_biserial"] == -1.0
    assert found["head"]["p"] == pytest.approx(2 / 64)
    # Holm: the smallest of three times 3, the next times 2, then as it is
    assert [found[m]["p_holm"] for m in ("head", "tcur", "same")] == pytest.approx([6 / 64, 8 / 64, 1.0])
    assert holm([4 / 64, 1.0, 2 / 64]) == pytest.approx([8 / 64, 1.0, 6 / 64])


def test_ties_share_their_ranks() -> None:
    assert rank_biserial([1.0, -1.0, 2.0, 0.0]) == pytest.approx((1.5 - 1.5 + 3) / 6)
    assert paired([])["cases"] == 0


def test_the_sentence_says_how_far_the_subjects_can_tell() -> None:
    def row(method: str, dice: float, sd: float | str) -> dict[str, Any]:
        return {
            "method": method, "training_cases": 5, "dice_mean": dice, "dice_sd": sd, "seeds": 3,
            "trained_numbers": 2338 if method == "tcur" else 98338,
        }  # fmt: skip

    test = {"method": "tcur", "difference": -0.012, "low": -0.03, "high": 0.002, "subjects": 24}
    rows = [row("lora", 0.727, 0.002), row("tcur", 0.715, 0.001)]
    assert comparison_sentence(rows, [test], "lora") == (
        "Trained on 5 cases, tcur reaches 71.5 % Dice ± 0.1 over 3 seeds (2,338 trained parameters), 1.2 points less "
        "(24 subjects, 95 % interval -0.2 to 3.0; may be chance) than lora with 98,338 trained parameters; the best of "
        "the 2 methods is lora with 72.7 % Dice ± 0.2 over 3 seeds (98,338 trained parameters)."
    )
    few = {**test, "low": math.nan, "high": math.nan, "subjects": 2}
    assert "1.2 points less (2 subjects, too few for an interval) than lora" in comparison_sentence(rows, [few], "lora")
    rows[1]["warm_up_steps"] = 120
    assert "(2,338 trained parameters, after a warm-up of 120 steps), 1.2" in comparison_sentence(rows, [test], "lora")
    assert "there is no score" in comparison_sentence([row("lora", math.nan, "")], [], "lora")


def test_a_training_set_is_a_list_only_where_one_is_named() -> None:
    rows = [{"training_set": "all", "training_cases": "6"}, {"training_set": "hard", "training_cases": "1"}]
    titles = {
        title_of(Part(name, Path(), FinetuneSettings(train_list=chosen)), rows)
        for name, chosen in (("all", "train"), ("all", "five"), ("hard", "hard"))
    }
    assert titles == {"All training cases (6)", "All of the list five (6 cases)", "hard (1 case)"}


def test_cells_of_tables() -> None:
    assert (number(math.nan), number(""), number(None), number(0.123, 100, 1, "+")) == ("-", "-", "-", "+12.3")
    assert (with_sd(0.5, "", 100), with_sd(0.5, 0.01, 100)) == ("50.0", "50.0 ± 1.0")
    assert in_lines("tcur-learned:rows_only=true", 18) == "tcur-learned\n:rows_only=true"


def test_lines_over_training_cases_join_nested_sets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, Any]] = []
    draw_lines = figures._draw_lines

    def noted(path: Path, series: Any, *rest: Any, alone: Any, **named: Any) -> None:
        drawn.append((series, alone))
        draw_lines(path, series, *rest, alone=alone, **named)

    monkeypatch.setattr(figures, "_draw_lines", noted)
    rows = [
        {"training_set": name, "training_cases": cases, "method": "lora", "dice_mean": 0.5, "dice_sd": ""}
        for name, cases in (("hard", 3), ("3", 3), ("all", 9), ("1", 1))
    ]
    figures.draw_shots(tmp_path / "shots.png", rows)
    figures.draw_shots(tmp_path / "lists.png", rows[:1])
    line, point = {"lora": [(1, 50.0, 0.0), (3, 50.0, 0.0), (9, 50.0, 0.0)]}, {"lora": [(3, 50.0, 0.0)]}
    assert drawn == [(line, point), ({"lora": []}, point)]
    assert {path.name for path in tmp_path.iterdir()} == {"shots.png", "lists.png"}


def test_names_in_figures_are_short_and_different() -> None:
    names = ["tcur", "tcur:orthonormal=true", "tcur-carried:factors=a:rank=4", "lora:bits=2"]
    assert list(short_names(names).values()) == ["tcur", "tcur orthonormal", "tcur-carried r=4", "lora bits=2"]
    alike = ["tcur-carried:factors=a:rank=4", "tcur-carried:factors=b:rank=4"]
    assert list(short_names(alike).values()) == alike


def test_names_at_the_ends_of_lines_keep_their_order_and_a_distance() -> None:
    values = [3.0, 1.0, 1.1, 1.05, 9.0]
    found = spread(values, 0.5)
    assert sorted(range(5), key=found.__getitem__) == sorted(range(5), key=values.__getitem__)
    assert np.diff(sorted(found)).min() >= 0.5 - 1e-6
    assert found[4] == 9.0
