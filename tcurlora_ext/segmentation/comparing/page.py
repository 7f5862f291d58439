"""The table of a comparison on the terminal, and its report.html, which needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.records import read_json
from tcurlora_ext.segmentation.comparing.findings import comparison_sentence
from tcurlora_ext.segmentation.comparing.settings import ALL, Part, Plan
from tcurlora_ext.segmentation.metrics.comparison import ALL as MEAN
from tcurlora_ext.segmentation.metrics.comparison import FEWEST
from tcurlora_ext.segmentation.report.cells import (
    corrected_p,
    hd95,
    in_lines,
    number,
    results_table,
    table_notes,
    with_interval,
    with_sd,
)
from tcurlora_ext.segmentation.report.page import data_url, least_width, render, settings_rows

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def cases_of(part: Part, rows: Sequence[Row]) -> int:
    """How many cases a run was trained on.

    Args:
        part: The run.
        rows: Of table.csv.
    """
    return next(int(row["training_cases"]) for row in rows if row["training_set"] == part.name)


def largest(parts: Sequence[Part], rows: Sequence[Row]) -> Part:
    """The run of most training cases, which the headline and most figures are of; of several the last.

    Args:
        parts: The runs.
        rows: Of table.csv.
    """
    return max(reversed(parts), key=lambda part: cases_of(part, rows))


def title_of(part: Part, rows: Sequence[Row]) -> str:
    """What a run was trained on, in words.

    Args:
        part: The run.
        rows: Of table.csv.
    """
    count = cases_of(part, rows)
    cases = f"{count} case{'s' if count != 1 else ''}"
    if part.name.isdecimal():
        return f"{part.name} training subject{'s' if part.name != '1' else ''} ({cases})"
    if part.name != ALL:
        return f"{part.name} ({cases})"
    chosen = part.settings.train_list  # "train" may be no list, but what a random draw leaves
    return f"All training cases ({count})" if chosen == "train" else f"All of the list {chosen} ({cases})"


def _means(rows: Sequence[Row], part: Part) -> list[Row]:
    return [row for row in rows if row["training_set"] == part.name and row["label"] == MEAN]


def _dice_tests(tests: Sequence[Row], part: Part) -> dict[str, Row]:
    return {row["method"]: row for row in tests if row["training_set"] == part.name and row["measure"] == "dice"}


def _memory(row: Row) -> str:
    return number(row["gpu_peak_mib"] if row["gpu_peak_mib"] != "" else row["step_mib"], 1, 1)


def terminal_tables(plan: Plan, parts: Sequence[Part], rows: Sequence[Row], tests: Sequence[Row]) -> list[Table]:
    """A table of each training set, in at most 80 columns; ± is the standard deviation over seeds."""
    header = (
        "method", "trained\nparameters", "Dice %", "HD95\nmm",
        f"Dice minus\n{in_lines(plan.reference, 20)}\n(95 % interval)", "p\n(Holm)",
    )  # fmt: skip
    tables = []
    for part in parts:
        found = _dice_tests(tests, part)
        cells = [
            [
                in_lines(row["method"], 18), f"{row['trained_numbers']:,}",
                with_sd(row["dice_mean"], row["dice_sd"], 100),
                hd95(row, number(row["hd95_mm_mean"])),
                with_interval(found.get(row["method"])), corrected_p(found.get(row["method"])),
            ]
            for row in _means(rows, part)
        ]  # fmt: skip
        tables.append(results_table(header, cells, title_of(part, rows), notes=_notes(_means(rows, part), found)))
    return tables


def _notes(rows: Sequence[Row], tests: Mapping[str, Row]) -> list[str]:
    """What stands below the table of a training set: which values are missing, and which methods take more steps."""
    counts = {int(test["subjects"]) for test in tests.values()} - {0}
    few = max(counts, default=FEWEST)
    said = [] if few >= FEWEST else [f"{few} subject{'s are' if few != 1 else ' is'} too few for an interval"]
    return [*said, *table_notes(rows)]


def _page_rows(plan: Plan, rows: Sequence[Row], tests: Mapping[str, Row]) -> list[list[str]]:
    return [
        [
            row["method"], f"{row['trained_numbers']:,}", with_sd(row["dice_mean"], row["dice_sd"], 100),
            with_interval(tests.get(row["method"])), corrected_p(tests.get(row["method"])),
            hd95(row, with_sd(row["hd95_mm_mean"], row["hd95_mm_sd"], 1, 2)), number(row["step_ms"], 1, 0),
            _memory(row), number(row["adapter_bytes"], 1e-3, 1), str(row["warm_up_steps"] or ""),
        ]
        for row in rows
    ]  # fmt: skip


def _test_rows(tests: Sequence[Row]) -> list[list[str]]:
    rows = []
    for test in tests:
        measure, factor, digits = ("Dice", 100, 2) if test["measure"] == "dice" else ("HD95 mm", 1, 3)
        rows.append([
            test["training_set"], measure, test["method"], str(test["subjects"]), with_interval(test, factor, digits),
            number(test["rank_biserial"], 1, 2, "+"), number(test["p"], 1, 4), number(test["p_holm"], 1, 4),
        ])  # fmt: skip
    return rows


def _equal(plan: Plan, parts: Sequence[Part]) -> list[str]:
    """What all methods had in common."""
    settings = plan.settings
    lines = [
        f"Every method and seed starts from the same base (SHA-256 {_bases(parts)}) and is trained for "
        f"{settings.steps} optimizer steps of {settings.batch * settings.accumulate} windows; a seed's windows and "
        f"their augmentation ({settings.augment}{', with flips' if settings.flips else ''}) are the same for all.",
        "The head or decoder that trains beside an adapter has the learning rate that it has alone.",
        "Scores are those of the adapter file read back, on the same validation cases, on which nothing was chosen.",
    ]
    if settings.select == "last":
        lines.append("The weights are those of the last step.")
    if settings.tune:
        what = " and ".join(["the learning rate", *settings.tune_over])
        lines.append(
            f"Every method had {settings.trials} trials for {what}, on {settings.tune_folds} folds of the training "
            "cases."
        )
    else:
        lines.append("Learning rates were not searched (--tune): each method has its own or that of --lr.")
    return lines


def _bases(parts: Sequence[Part]) -> str:
    found = dict.fromkeys(read_json(part.out / "run.json")["base"]["sha256"][:12] for part in parts)
    return ", ".join(found)


def write_page(
    plan: Plan, parts: Sequence[Part], rows: Sequence[Row], tests: Sequence[Row], figures: Sequence[tuple[str, str]]
) -> str:
    """Write report.html; returns its first sentence.

    Args:
        plan: Of the comparison.
        parts: The runs.
        rows: Of table.csv.
        tests: Of tests.csv.
        figures: The title of each figure, and its file's name in the folder of the comparison without ".png".
    """
    shown, seeds = largest(parts, rows), plan.settings.seeds
    runs = {part.name: read_json(part.out / "run.json") for part in parts}
    means, found = _means(rows, shown), _dice_tests(tests, shown)
    result = comparison_sentence(means, list(found.values()), plan.reference)
    subjects = next((f" of {test['subjects']} subjects" for test in found.values()), "")
    measured_on_gpu = any(row["gpu_peak_mib"] != "" for row in rows)
    content = render(
        "comparison.html.j2",
        result=result,
        methods=[method.name for method in plan.methods],
        source=plan.settings.data or "embedded target domain (MNI152 template)",
        validation=f"{len(runs[shown.name]['data']['val'])} validation cases{subjects}",
        seeds=seeds,
        steps=plan.settings.steps,
        reference=plan.reference,
        header=[
            "method", "trained parameters", "Dice %", f"minus {plan.reference} (95 % interval)", "p (Holm)", "HD95 mm",
            "step ms", "memory MiB", "file KB", "warm-up steps",
        ],
        parts=[
            {
                "title": title_of(part, rows),
                "rows": _page_rows(plan, _means(rows, part), _dice_tests(tests, part)),
                "notes": _notes(_means(rows, part), _dice_tests(tests, part)),
                "settings": settings_rows(runs[part.name]),
            }
            for part in parts
        ],
        gpu=measured_on_gpu,
        side_by_side=(plan.out / "steps.csv").is_file(),
        figures=[
            {"title": title, "source": data_url(plan.out / f"{name}.png"), "alt": CAPTIONS[name],
             "least": least_width(plan.out / f"{name}.png") if name == "overlays" else 0}
            for title, name in figures
        ],
        test_header=[
            "trained on", "of", "method", "subjects", f"minus {plan.reference} (95 % interval)", "rank-biserial", "p",
            "p (Holm)",
        ],
        test_rows=_test_rows(tests),
        label_header=["trained on", "method", "label", "Dice %", "HD95 mm"],
        label_rows=[
            [
                row["training_set"], row["method"], row["label"], with_sd(row["dice_mean"], row["dice_sd"], 100),
                with_sd(row["hd95_mm_mean"], row["hd95_mm_sd"], 1, 2),
            ]
            for row in rows
            if row["label"] != MEAN
        ],
        equal=_equal(plan, parts),
    )  # fmt: skip
    write_bytes(plan.out / "report.html", content)
    return result


CAPTIONS = {
    "parameters": "Dice against the number of trained parameters, mean and standard deviation over seeds",
    "time": "Dice against the median time of a training step, mean and standard deviation over seeds",
    "shots": "Dice against the number of training cases, mean and standard deviation over seeds",
    "subjects": "Dice of each validation subject by method: a dot for a subject, a box for the quartiles",
    "curves": "Validation Dice over the steps of training, mean and standard deviation over seeds",
    "overlays": "Axial slices with the contours of truth and predictions of seed 0, and the Dice of each case",
}
