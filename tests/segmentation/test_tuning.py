"""The search on folds of the training cases: equal budgets, resumable, and nothing of the cases reported on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.methods import get_methods
from tcurlora_ext.segmentation.runs import tuning
from tcurlora_ext.segmentation.runs.adapting import Choice
from tcurlora_ext.segmentation.runs.finetuning import finetune
from tcurlora_ext.segmentation.runs.network import load_adapted
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.training import Diverged


def rates(settings: FinetuneSettings, name: str) -> list[float]:
    (method,) = get_methods([name])
    settings = replace(settings, lr={method.name: 0.01})
    return [choice.lr for choice in tuning.candidates(method, settings)]


def test_every_method_gets_as_many_candidates_on_the_same_grid() -> None:
    for trials, factors in ((1, [1]), (2, [1, 1 / 3]), (3, [1, 1 / 3, 3]), (5, [1, 1 / 3, 3, 1 / 9, 9])):
        for name in ("head", "tcur"):
            assert rates(FinetuneSettings(trials=trials), name) == pytest.approx([0.01 * factor for factor in factors])


@pytest.mark.parametrize("trials", [2, 4, 9])
def test_rank_and_alpha_are_searched_where_a_method_has_them_by_as_many_candidates(trials: int) -> None:
    settings = FinetuneSettings(trials=trials, tune_over=("rank", "alpha"), rank=8, lora_rank=6, alpha=4.0)
    own: dict[str, list[dict[str, Any]]] = {}
    for name in ("head", "lora", "tcur", "tcur:rank=4"):
        (method,) = get_methods([name])
        found = tuning.candidates(method, replace(settings, lr={method.name: 0.01}))
        assert len(found) == trials
        assert len({(choice.lr, *choice.own.values()) for choice in found}) == trials
        own[name] = [dict(choice.own) for choice in found]
    assert own["head"] == [{}] * trials
    assert own["lora"][0] == {"rank": 6}
    assert own["tcur"][0] == {"rank": 8, "alpha": 4.0}
    assert own["tcur:rank=4"][0] == {"rank": 4, "alpha": 4.0}
    assert {choice["rank"] for choice in own["tcur"]} <= {4, 8, 16}
    assert {choice["alpha"] for choice in own["tcur"]} <= {1.0, 4.0, 16.0}


def test_what_a_search_has_found_in_words() -> None:
    choices, on = [Choice(0.01), Choice(0.03, {"rank": 4})], "on folds of the training cases"
    assert tuning.in_words(choices, [0.27, 0.26], 0) == (
        f"the default was best, learning rate 0.01, of 2 candidates, with Dice 27.0 {on}"
    )
    assert tuning.in_words(choices, [0.26, 0.27], 1) == (
        f"learning rate 0.03, rank 4, the best of 2 candidates, with Dice 27.0 {on}; the default, learning rate 0.01, "
        "has 26.0"
    )
    diverged = tuning.in_words(choices, [float("nan"), 0.27], 1)
    assert diverged.endswith("the default, learning rate 0.01, could not be trained")
    assert tuning.in_words(choices[:1], [0.27], 0) == f"learning rate 0.01, the only candidate, with Dice 27.0 {on}"


class Stopped(Exception):
    pass


@pytest.fixture
def chosen(settings: Callable[..., FinetuneSettings]) -> FinetuneSettings:
    return settings(
        methods=("head", "tcur"), steps=2, tune=True, trials=3, tune_folds=3, tune_over=("rank",), lr={"head": 0.01}
    )


def test_a_run_trains_with_what_the_folds_of_its_training_cases_say(
    chosen: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fit, trained = tmp_path / "run", tuning.fit, []

    def watched(job: Any, method: Any, choice: Any, seed: int, folder: Path, volumes: Any, **named: Any) -> Any:
        trained.append(set(volumes.names))
        return fit(job, method, choice, seed, folder, volumes, **named)

    monkeypatch.setattr(tuning, "fit", watched)
    finetune(chosen, out)
    rows, run = read_csv(out / "tune.csv"), read_json(out / "run.json")
    assert [(row["method"], row["trial"], row["fold"]) for row in rows] == [
        (method, str(trial), str(fold)) for method in ("head", "tcur") for trial in range(3) for fold in range(3)
    ]
    train = set(run["data"]["train"])
    for row, others in zip(rows, trained, strict=True):
        assert others == train - {row["cases"]}  # each fold is one case, and is not trained on
        assert row["cases"] in train
    results = {row["method"]: row for row in read_csv(out / "metrics.csv")}
    for method in ("head", "tcur"):
        means = [
            sum(float(row["dice"]) for row in rows if (row["method"], row["trial"]) == (method, str(trial))) / 3
            for trial in range(3)
        ]
        best = next(r for r in rows if (r["method"], r["trial"]) == (method, str(means.index(max(means)))))
        assert float(results[method]["lr"]) == float(best["lr"]) == run["tuned"][method]["lr"]
    assert run["settings"]["lr"]["head"] == 0.01  # what was asked for
    assert not (out / "tune").exists()
    load_adapted(out, "tcur")  # by the options that its file has

    # a method that is added is searched too, and nothing else again
    del trained[:]
    finetune(replace(chosen, methods=("head", "tcur", "norms")), out, resume=True)
    assert len(trained) == 9
    assert read_csv(out / "tune.csv")[: len(rows)] == rows
    assert set(read_json(out / "run.json")["tuned"]) == {"head", "tcur", "norms"}
    with pytest.raises(ValueError, match="the run has trials = 3, found 4 now"):
        finetune(replace(chosen, methods=("head", "tcur", "norms"), trials=4), out, resume=True)

    # an interrupted search goes on where it was, with the same result
    parts = tmp_path / "parts"

    def stopped(*given: Any, **named: Any) -> Any:
        if (parts / "tune.csv").is_file() and len(read_csv(parts / "tune.csv")) == 4:
            raise Stopped
        return fit(*given, **named)

    monkeypatch.setattr(tuning, "fit", stopped)
    with pytest.raises(Stopped):
        finetune(chosen, parts)
    monkeypatch.setattr(tuning, "fit", watched)
    del trained[:]
    finetune(chosen, parts, resume=True)
    assert len(trained) == 14
    assert read_csv(parts / "tune.csv") == rows
    for method in ("head", "tcur"):
        name = f"{method}/seed0/adapter.safetensors"
        assert (parts / name).read_bytes() == (out / name).read_bytes()


def test_a_candidate_that_diverges_is_noted_and_not_chosen(
    settings: Callable[..., FinetuneSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = tuning.fit

    def diverging(job: Any, method: Any, choice: Any, *given: Any, **named: Any) -> Any:
        if choice.lr > least:
            raise Diverged("the loss of step 0 is nan")
        return fit(job, method, choice, *given, **named)

    monkeypatch.setattr(tuning, "fit", diverging)
    least = 0.05
    chosen = settings(methods=("head",), steps=1, tune=True, trials=2, tune_folds=2, lr={"head": 0.1})
    finetune(chosen, tmp_path / "run")
    rows = read_csv(tmp_path / "run/tune.csv")
    assert [row["dice"] == "nan" for row in rows] == [True, True, False, False]
    assert rows[0]["note"] == "the loss of step 0 is nan"
    assert float(read_csv(tmp_path / "run/metrics.csv")[0]["lr"]) == pytest.approx(0.1 / 3)
    least = 0.0
    with pytest.raises(ValueError, match="no candidate of head could be trained: the loss of step 0 is nan"):
        finetune(chosen, tmp_path / "none")
