"""The search for a learning rate, and for rank and alpha, on folds of the training cases, before a run's training.

Every method gets as many candidates, which are trained as in the run, with seed 0. The cases that the run is scored on
have no part in it. `tune.csv` has a row for each method, candidate and fold, written when it is done: an interrupted
search goes on where it was.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from tcurlora_ext.io.records import read_csv, read_json, write_csv, write_json
from tcurlora_ext.segmentation.methods import Method, Unset
from tcurlora_ext.segmentation.metrics import evaluation
from tcurlora_ext.segmentation.runs.adapting import Choice, Job, fit
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings
from tcurlora_ext.segmentation.runs.subjects import folds, hold_out
from tcurlora_ext.segmentation.training import Diverged

TUNE_OVER = ("rank", "alpha")
# On what a method has without a search: as factors, the first one its own value.
_RANKS, _ALPHAS = (1.0, 0.5, 2.0), (1.0, 0.25, 4.0)
Row = dict[str, Any]


def check(settings: FinetuneSettings) -> None:
    """Raise ValueError, naming the option, where one of the search is wrong."""
    if settings.trials < 1:
        raise ValueError(f"trials: found {settings.trials}, expected 1 or more")
    if settings.tune_folds < 2:
        raise ValueError(f"tune-folds: found {settings.tune_folds}, expected 2 or more")
    if set(settings.tune_over) - set(TUNE_OVER):
        raise ValueError(f"tune-over: found {','.join(settings.tune_over)}, expected some of {', '.join(TUNE_OVER)}")


def check_cases(settings: FinetuneSettings, names: Sequence[str]) -> None:
    """Raise ValueError where the training cases are too few for the folds, or for what a fold's training holds out."""
    try:
        parts = folds(names, settings.tune_folds, settings.data_seed, settings.subject_pattern)
    except ValueError as error:
        raise ValueError(f"tune-folds: {error}") from None
    for part in parts if settings.holds_out else []:
        hold_out([name for index, name in enumerate(names) if index not in part], settings)


def candidates(method: Method, settings: FinetuneSettings) -> list[Choice]:
    """As many candidates of a method as the settings have trials; the first is what it trains with without a search.

    Learning rates are 1, 1/3, 3, 1/9, 9, ... times the method's. Where its rank or alpha is searched too, the
    candidates after the first are drawn from all combinations by the data's seed; fewer learning rates are needed then.
    """
    rank = _own(method, "rank", settings.lora_rank if method.base == "lora" else settings.rank)
    alpha = _own(method, "alpha", settings.alpha)
    values: dict[str, list[Any]] = {}
    if "rank" in settings.tune_over and "rank" in method.options and "factors" not in method.own:
        values["rank"] = list(dict.fromkeys(max(1, round(rank * factor)) for factor in _RANKS))
    if "alpha" in settings.tune_over and "alpha" in method.options:
        values["alpha"] = [alpha * factor for factor in _ALPHAS]
    others = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    powers = sorted(range(-settings.trials, settings.trials + 1), key=lambda power: (abs(power), power))
    count = min(settings.trials, max(3, -(-settings.trials // len(others))))
    rates = [settings.lr[method.name] * 3.0**power for power in powers[:count]]
    combined = [Choice(rate, other) for rate, other in itertools.product(rates, others)]
    drawn = np.random.default_rng([settings.data_seed, 4]).permutation(len(combined) - 1)[: settings.trials - 1]
    return [combined[0], *(combined[1 + index] for index in sorted(drawn.tolist()))]


def _own(method: Method, option: str, otherwise: Any) -> Any:
    """The value of an option of a method, given or by default; else the run's."""
    value = method.own.get(option, method.options.get(option))
    return otherwise if value is None or isinstance(value, Unset) else value


def tune(job: Job, methods: Sequence[Method]) -> dict[str, Choice]:
    """Search for each method what it trains with; writes tune.csv and the entry "tuned" of run.json.

    Returns:
        The best candidate of each method, by its name: that of the highest Dice, as the mean over the folds.

    Raises:
        ValueError: No candidate of a method can be trained.
    """
    rows = read_csv(job.out / "tune.csv") if (job.out / "tune.csv").is_file() else []
    found = {}
    for method in methods:
        choices = candidates(method, job.settings)
        scores = [_score(job, method, trial, choice, rows) for trial, choice in enumerate(choices)]
        if np.isnan(scores).all():
            notes = {row["note"] for row in rows if row["method"] == method.name}
            raise ValueError(f"tune: no candidate of {method.name} could be trained: {'; '.join(sorted(notes))}")
        best = int(np.nanargmax(scores))
        found[method.name] = choices[best]
        job.display.say(f"tuned {method.name}: {in_words(choices, scores, best)}")
    run = read_json(job.out / "run.json")
    tuned = {name: {"lr": choice.lr, **choice.own} for name, choice in found.items()}
    if run.get("tuned") != tuned:  # methods may have been added
        write_json(job.out / "run.json", {**run, "tuned": tuned})
    shutil.rmtree(job.out / "tune", ignore_errors=True)
    return found


def in_words(choices: Sequence[Choice], scores: Sequence[float], best: int) -> str:
    """What a search has found.

    Args:
        choices: The candidates, of which the first is what the method trains with without a search.
        scores: The Dice of each, 0 to 1.
        best: The index of the best.
    """
    reached = f"with Dice {100 * scores[best]:.1f} on folds of the training cases"
    if len(choices) == 1:
        return f"{_text(choices[0])}, the only candidate, {reached}"
    if best == 0:
        return f"the default was best, {_text(choices[0])}, of {len(choices)} candidates, {reached}"
    default = "could not be trained" if np.isnan(scores[0]) else f"has {100 * scores[0]:.1f}"
    return (
        f"{_text(choices[best])}, the best of {len(choices)} candidates, {reached}; the default, {_text(choices[0])}, "
        f"{default}"
    )


def _text(choice: Choice) -> str:
    return ", ".join([f"learning rate {choice.lr:.3g}", *(f"{name} {value:g}" for name, value in choice.own.items())])


def _score(job: Job, method: Method, trial: int, choice: Choice, rows: list[Row]) -> float:
    """The mean Dice of a candidate over the folds, NaN where it cannot be trained; a fold that has a row is not run."""
    settings = job.settings
    parts = folds(job.train.names, settings.tune_folds, settings.data_seed, settings.subject_pattern)
    scores = []
    for number, part in enumerate(parts):
        key = {"method": method.name, "trial": str(trial), "fold": str(number)}
        row = next((row for row in rows if all(row[name] == value for name, value in key.items())), None)
        if row is None:
            dice, note = _run_fold(job, method, trial, choice, number, part)
            row = {
                **key, "lr": repr(choice.lr), "rank": str(choice.own.get("rank", "")),
                "alpha": str(choice.own.get("alpha", "")), "dice": repr(dice), "note": note,
                "cases": ";".join(job.train.names[index] for index in part),
            }  # fmt: skip
            rows.append(row)
            write_csv(job.out / "tune.csv", rows)
        scores.append(float(row["dice"]))
    return float(np.mean(scores))


def _run_fold(
    job: Job, method: Method, trial: int, choice: Choice, number: int, part: Sequence[int]
) -> tuple[float, str]:  # fmt: skip
    """Dice on the cases of a fold after training on those of the others, and why there is none."""
    folder = job.out / "tune" / method.folder / f"trial{trial}" / f"fold{number}"
    others = [index for index in range(len(job.train)) if index not in part]
    title = f"tuning {method.name}, {_text(choice)}, fold {number + 1} of {job.settings.tune_folds}"
    try:
        fitted = fit(job, method, choice, 0, folder, job.train.part(others), title=title)
    except ValueError as error:
        # a rate may be too high, and a rank too high for the network; anything else is an error of the run
        if not isinstance(error, Diverged) and "rank" not in choice.own:
            raise
        return float("nan"), str(error).replace("\n", " ")
    dice = evaluation.mean_dice(fitted.model, job.train.part(part), job.config)
    shutil.rmtree(folder, ignore_errors=True)
    return dice, ""
