"""Scoring the methods of a run, and folders of label maps, side by side on the same cases.

scores.csv    one row for each method, seed, case and label
scores.json   the cases, means with intervals, and comparisons of methods
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcurlora_ext.io.atomic import write_together
from tcurlora_ext.io.records import csv_bytes
from tcurlora_ext.segmentation.methods import METHODS
from tcurlora_ext.segmentation.metrics.comparison import ALL, LEVEL, compare_methods, summarise_scores, tables
from tcurlora_ext.segmentation.metrics.evaluation import OVERLAP
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.prediction.predictor import Run, choose_method, choose_seeds, open_run
from tcurlora_ext.segmentation.runs.pretraining import pick_device
from tcurlora_ext.segmentation.scoring.scoring import Cases, find_cases, score_predictions, score_run
from tcurlora_ext.segmentation.terminal import Display


@dataclass(frozen=True)
class EvaluateSettings:
    """What `tcurlora evaluate` scores; its --help describes the options.

    Attributes:
        run: The run folder; None to score `predictions` alone.
        data: None for the run's own data set.
        predictions: Folders of label maps.
        case_list: A list of splits.json, "all", or None for the default.
        method: "all", or names with commas between.
        seed: "all", or numbers with commas between.
        labels: Class names, background first, where neither run nor dataset.json has them.
        fold: A fold of the data set, whose list "val", or `case_list`, is scored.
        map_labels: Values that stand for others in labels; None: as in the run.
        overlap: Of neighbouring windows.
        device: "auto", or a device of PyTorch.
    """

    run: Path | None = None
    data: Path | None = None
    predictions: tuple[Path, ...] = ()
    case_list: str | None = None
    method: str = "all"
    seed: str = "all"
    labels: tuple[str, ...] | None = None
    fold: int | None = None
    map_labels: dict[int, int] | None = None
    overlap: float = OVERLAP
    device: str = "auto"


def evaluate(
    settings: EvaluateSettings, out: Path | None = None, *, overwrite: bool = False, display: Display | None = None
) -> dict[str, Any]:
    """Score, write scores.csv and scores.json to a folder together, and show tables.

    Args:
        settings: What to score.
        out: The folder; None for ``evaluation`` in the run folder or in the first folder of label maps.
        overwrite: Whether to replace scores that are there.
        display: Where progress and tables are shown.

    Returns:
        The content of scores.json.

    Raises:
        ValueError, FileNotFoundError: Settings, run, data or label maps are wrong; nothing is written then.
    """
    require_package("scipy")
    display = display or Display()
    if settings.run is None and not settings.predictions:
        raise ValueError("found neither a run folder nor --predictions, expected at least one to score")
    if not 0 <= settings.overlap < 1:
        raise ValueError(f"overlap: found {settings.overlap}, expected a number from 0 to below 1")
    run = None if settings.run is None else open_run(settings.run)
    out = out or (settings.run or settings.predictions[0]) / "evaluation"
    _check_output(out, overwrite)
    chosen = {} if run is None else _chosen(run, settings)
    folders = _named(settings.predictions)
    cases = find_cases(
        settings.data, run, settings.case_list, settings.labels, folders, settings.fold, settings.map_labels
    )  # fmt: skip
    display.say(f"{len(cases.cases)} cases: {cases.source}")
    _say_trained(run, cases, display)
    rows: list[dict[str, Any]] = []
    for name, folder in folders.items():
        rows += score_predictions(name, folder, cases, display)
    if run is not None:
        device = pick_device(settings.device)
        rows = score_run(run, chosen, cases, overlap=settings.overlap, device=device, display=display) + rows
    result = describe(rows, cases)
    content = (json.dumps(_plain(result), indent=2, allow_nan=False) + "\n").encode()
    write_together(out, {"scores.csv": csv_bytes(rows), "scores.json": content})
    for table in tables(result["summary"], result["comparisons"]):
        display.say(f"\n{table}")
    display.say(f"\nscores: {out / 'scores.csv'} and scores.json")
    return result


def _chosen(run: Run, settings: EvaluateSettings) -> dict[str, tuple[int, ...]]:
    """The seeds of each method to score. ValueError where one of them has not finished."""
    names = list(run.seeds) if settings.method == "all" else [name.strip() for name in settings.method.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"method: found '{settings.method}', expected each once of {', '.join(METHODS)}, or all")
    return {name: choose_seeds(run, choose_method(run, name)[0], settings.seed) for name in names}


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their names, which stand in place of a method."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in found or name in METHODS:
            other = found.get(name, f"the method '{name}'")
            raise ValueError(f"predictions: {folder} has the name of {other}, expected folders of different names")
        found[name] = folder
    return found


def _check_output(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: found a file, expected a folder or nothing")
    if not overwrite:
        for name in ("scores.csv", "scores.json"):
            if (out / name).exists():
                raise ValueError(f"{out / name}: the file exists; expected another folder, or --overwrite")


def _say_trained(run: Run | None, cases: Cases, display: Display) -> None:
    trained = set() if run is None else set(run.description["data"]["train"])
    both = sorted(trained & {case.name for case in cases.cases})
    if both:
        display.say(
            f"warning: {len(both)} of these cases have the names of cases that the run was trained on ({both[0]}, "
            "...); if they are the same, their scores say nothing about new scans"
        )


def describe(rows: Sequence[dict[str, Any]], cases: Cases) -> dict[str, Any]:
    """The content of scores.json from the rows of scores.csv."""
    return {
        "source": cases.source,
        "cases": [case.name for case in cases.cases],
        "labels": {str(value): name for value, name in cases.labels.items()},
        "mean_over_labels": ALL,
        "interval": f"{LEVEL:.0%} of the mean over cases, percentile bootstrap; cases are resampled, seeds averaged",
        "summary": summarise_scores(rows),
        "comparisons": compare_methods(rows),
    }


def _plain(value: Any) -> Any:
    """The same with null in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
