"""Several methods compared over seeds, and over numbers of training subjects, in one folder.

    run.json              settings and versions
    <training set>/       a run folder of `tcurlora finetune` for each number of subjects or list
    table.csv             scores and costs, one row for each training set, method and label
    cases.csv             scores of each training set, method, seed and validation case
    tests.csv             each method against the reference, paired over subjects
    steps.csv             time and memory of a step of each method, measured side by side
    *.png  report.html
    data/  pretrain/      only without --data: the embedded subjects, and the network that all runs adapt

What is there already is not run again: methods and seeds with a result.json, also of runs that `tcurlora finetune` has
made in these folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tcurlora_ext.io.records import read_json, write_csv, write_json
from tcurlora_ext.segmentation.comparing import figures
from tcurlora_ext.segmentation.comparing.collecting import collect_cases, collect_results, subjects_of, table
from tcurlora_ext.segmentation.comparing.measuring import measure_steps, read_steps
from tcurlora_ext.segmentation.comparing.page import largest, terminal_tables, title_of, write_page
from tcurlora_ext.segmentation.comparing.settings import (
    CompareSettings,
    Part,
    Plan,
    finished,
    make_plan,
    reference_of,
    with_earlier,
)
from tcurlora_ext.segmentation.comparing.testing import against_reference, subject_scores
from tcurlora_ext.segmentation.dataset.layouts import read_layout
from tcurlora_ext.segmentation.dataset.reading import read_cases
from tcurlora_ext.segmentation.dataset.subjects import few_subjects
from tcurlora_ext.segmentation.methods import base_name
from tcurlora_ext.segmentation.metrics.comparison import ALL as MEAN
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.report.overlays import draw_overlays
from tcurlora_ext.segmentation.runs.finetuning import finetune, first_predictions, open_job, pretrain_embedded
from tcurlora_ext.segmentation.runs.folder import check_folder, describe, open_folder
from tcurlora_ext.segmentation.runs.pretraining import embedded, with_fraction
from tcurlora_ext.segmentation.runs.settings import FinetuneSettings, read_settings
from tcurlora_ext.segmentation.terminal import Display
from tcurlora_ext.segmentation.training import Diverged

SHOWN = 3  # methods in overlays

Row = dict[str, Any]


def compare(settings: CompareSettings, out: Path, *, display: Display | None = None) -> list[Row]:
    """Run what is missing of a comparison, and write its tables, figures and report to the folder `out`.

    Returns:
        The rows of table.csv.

    What the comparison in the folder has beside the settings (methods, seeds, training sets) stays in its tables.

    Raises:
        ValueError, FileNotFoundError: Settings, data or weights are wrong, or the folder holds something else; raised
            before anything is trained.
        Diverged: The loss of a method has become infinite or NaN. Everything else is trained first, and the tables are
            of the other methods; resumed, the comparison tries it again, at another rate where one is given.
    """
    display = display or Display()
    for package in ("matplotlib", "jinja2", "pandas", "scipy"):  # the tables come last, after all the training
        require_package(package)
    settings, more = with_earlier(settings, out)
    plan = make_plan(settings, out)
    description, defaults = _described(plan.settings), _described(CompareSettings())["settings"]
    own = [part.out.name for part in plan.parts(Path(), Path())]
    check_folder(out, description, True, defaults, own)
    parts = plan.parts(*_sources(plan))
    _check_parts(plan, parts)
    if more:
        display.say(f"also of the comparison in {out}: {more}")
    open_folder(out, description, True, defaults, own)
    if settings.data is None:
        _make_embedded(plan, display)
        _check_parts(plan, parts)
    missing = [part for part in parts if not finished(part, plan.methods, settings.seeds)]
    diverged: list[Diverged] = []
    for part in missing:
        display.say(f"training set {part.name}: {part.out}")
        try:
            finetune(part.settings, part.out, resume=(part.out / "run.json").is_file(), display=display)
        except Diverged as error:
            diverged.append(error)
    if diverged:
        plan = _without_unfinished(plan, parts, diverged[0])
    measured = read_steps(plan)
    if settings.measure and not measured:
        measured = measure_steps(plan, open_job(parts[0].settings, parts[0].out, display))
    rows = _finish(plan, parts, measured, bool(missing), display)
    if diverged:
        raise Diverged("; ".join(map(str, diverged)))
    return rows


def _without_unfinished(plan: Plan, parts: Sequence[Part], error: Diverged) -> Plan:
    """The plan of those methods that every training set has finished; raises the error where there is none."""
    seeds = plan.settings.seeds
    methods = tuple(method for method in plan.methods if all(finished(part, [method], seeds) for part in parts))
    if not methods:
        raise error
    return replace(plan, methods=methods, reference=reference_of(methods, plan.reference))


def _described(settings: CompareSettings) -> dict[str, Any]:
    return describe("compare", with_fraction(settings))


def _sources(plan: Plan) -> tuple[Path, Path]:
    """The data set and the base of all runs; without data, where the embedded ones will be."""
    settings = plan.settings
    if settings.data is not None and settings.pretrained is not None:
        return settings.data, settings.pretrained
    return plan.out / "data" / "target", settings.pretrained or plan.out / "pretrain" / "base.safetensors"


def _make_embedded(plan: Plan, display: Display) -> None:
    """The embedded target domain, and a base pretrained on the source domain, in the folder of the comparison."""
    settings = plan.settings
    embedded(plan.out / "data", "target", settings.subjects, settings.data_seed, display)
    if settings.pretrained is None:
        pretrain_embedded(settings, plan.out / "pretrain", display)


def _check_parts(plan: Plan, parts: Sequence[Part]) -> None:
    """Raise an error where a run that is there was made otherwise, a training set cannot be chosen, or the file of
    subjects leaves a validation case out."""
    defaults = describe("finetune", FinetuneSettings())["settings"]
    for part in parts:
        settings, done = part.settings, finished(part, plan.methods, plan.settings.seeds)
        if done:  # more may have been run in this folder than is compared
            settings = _with_all_of(part)
        check_folder(part.out, describe("finetune", with_fraction(settings)), True, defaults)
        if done:
            subjects_of(read_json(part.out / "run.json")["data"]["val"], plan)
        elif settings.data is not None and settings.data.is_dir():
            split = read_cases(read_layout(settings.data), **settings.lists)
            subjects_of([case.name for case in split.val], plan)
        elif settings.shots is not None:  # of embedded subjects, which are not there yet
            few_subjects([str(n) for n in range(settings.subjects[0])], settings.shots, settings.data_seed, None)


def _with_all_of(part: Part) -> FinetuneSettings:
    """The settings of a run with the methods, seeds and learning rates that its folder has beside those compared."""
    earlier, now = read_settings(part.out, "finetune", FinetuneSettings), part.settings
    return replace(
        now, methods=tuple(dict.fromkeys([*earlier.methods, *now.methods])), seeds=max(earlier.seeds, now.seeds),
        lr={**earlier.lr, **now.lr},
    )  # fmt: skip


def _finish(
    plan: Plan, parts: Sequence[Part], measured: dict[str, Row], trained: bool, display: Display
) -> list[Row]:  # fmt: skip
    """Write and show what has been reached; returns the rows of table.csv."""
    out = plan.out
    rows = table(collect_results(plan, parts), parts, measured)
    cases = collect_cases(plan, parts)
    tests = against_reference(cases, plan.reference)
    write_csv(out / "table.csv", rows)
    write_csv(out / "cases.csv", cases)
    write_csv(out / "tests.csv", tests)
    drawn = _draw(plan, parts, rows, cases)
    shown = largest(parts, rows)
    chosen = _chosen(plan, shown, rows)
    if trained or read_json(out / "run.json").get("overlays") != chosen or not (out / "overlays.png").is_file():
        _draw_overlays(plan, shown, chosen["methods"], display)
        write_json(out / "run.json", {**read_json(out / "run.json"), "overlays": chosen})
    result = write_page(plan, parts, rows, tests, drawn)
    for printed in terminal_tables(plan, parts, rows, tests):
        display.console.print(printed)
    display.say("± is over seeds; interval and p are over subjects, each a mean over seeds")
    display.say(result)
    display.say(f"table: {out / 'table.csv'}, cases.csv and tests.csv; report: {out / 'report.html'}")
    return rows


def _draw(
    plan: Plan, parts: Sequence[Part], rows: Sequence[Row], cases: Sequence[Row]
) -> list[tuple[str, str]]:  # fmt: skip
    """Draw the figures, but for the overlays, of the largest training set; returns the titles and names of all."""
    out, shown, names = plan.out, largest(parts, rows), [method.name for method in plan.methods]
    means = [row for row in rows if row["label"] == MEAN]
    own = [row for row in means if row["training_set"] == shown.name]
    on = f", {title_of(shown, rows)}" if len(parts) > 1 else ""
    found = []
    if figures.draw_cost(out / "parameters.png", own, "trained_numbers", "trained parameters"):
        found.append((f"Dice and trained parameters{on}", "parameters"))
    if figures.draw_cost(out / "time.png", own, "step_ms", "time of a training step, ms"):
        found.append((f"Dice and time{on}", "time"))
    if len(parts) > 1:
        figures.draw_shots(out / "shots.png", means)
        found.append(("Dice and training cases", "shots"))
    figures.draw_boxes(
        out / "subjects.png", {name: subject_scores(cases, shown.name, name, "dice") for name in names}
    )  # fmt: skip
    figures.draw_validation(out / "curves.png", shown, names, plan.settings.seeds)
    found += [(f"Dice of each subject{on}", "subjects"), (f"Learning curves{on}", "curves")]
    return [*found, (f"Prediction and truth{on}", "overlays")]


def _chosen(plan: Plan, part: Part, rows: Sequence[Row]) -> Row:
    """What the overlays show: the reference, the first form of tCUR and the best other methods of a training set."""
    means = [row for row in rows if (row["training_set"], row["label"]) == (part.name, MEAN)]
    own = [row["method"] for row in means if base_name(row["method"]).startswith("tcur")][:1]
    best = [row["method"] for row in sorted(means, key=lambda row: -row["dice_mean"])]
    return {"training_set": part.name, "methods": list(dict.fromkeys([plan.reference, *own, *best]))[:SHOWN]}


def _draw_overlays(plan: Plan, part: Part, chosen: Sequence[str], display: Display) -> None:
    """Draw the predictions of some methods for the first validation cases, after those before adaptation."""
    job = open_job(part.settings, part.out, display)
    draw_overlays(plan.out, job.val, first_predictions(job, chosen), job.classes)
