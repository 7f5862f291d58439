"""The results of a run: rows of summary.csv, the table on the terminal, and report.html, which needs no other file."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.io.table import rich_table
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.methods import METHODS, base_name
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean
from tcurlora_ext.segmentation.networks import NetworkConfig, get_spec
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.report.figures import draw_curves
from tcurlora_ext.segmentation.report.findings import result_sentence
from tcurlora_ext.segmentation.report.overlays import draw_overlays

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
HEADER = ("method", "what trains", "trained parameters", "Dice %", "HD95 mm", "seconds")


def summarise_runs(results: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per method, from one row per method and seed.

    Scores and seconds are means over seeds; Dice also has its standard deviation (of n - 1; empty for one seed), its
    smallest and its largest value.
    """
    rows = []
    for method in dict.fromkeys(row["method"] for row in results):
        runs = [row for row in results if row["method"] == method]
        dice = [row["dice"] for row in runs]
        scores = [key for key in runs[0] if key.startswith(("dice ", "hd95_mm"))]
        rows.append({
            "method": method, "seeds": len(runs), "trained_numbers": runs[0]["trained_numbers"], "lr": runs[0]["lr"],
            "steps": runs[0]["steps"], "dice_mean": finite_mean(dice),
            "dice_sd": statistics.stdev(dice) if len(dice) > 1 else "", "dice_min": min(dice), "dice_max": max(dice),
            **{key: finite_mean([row[key] for row in runs]) for key in scores},
            "hd95_undefined": sum(row["hd95_undefined"] for row in runs),
            "seconds": round(finite_mean([row["seconds"] for row in runs]), 2),
            "warm_up_steps": runs[0].get("warm_up_steps", 0),
            "adapter_bytes": round(finite_mean([row.get("adapter_bytes", math.nan) for row in runs])),
        })  # fmt: skip
    return rows


def comparisons(summary: Sequence[Row]) -> list[str]:
    """Differences in Dice between tcur, lora and head, in percentage points, one sentence for each pair.

    With several seeds, each is compared with the spread over seeds: of the two methods' ranges (largest minus smallest
    Dice) the larger one.
    """
    by_name = {row["method"]: row for row in summary}
    lines = []
    for name, other in (("tcur", "head"), ("lora", "head"), ("tcur", "lora")):
        if name not in by_name or other not in by_name:
            continue
        a, b = by_name[name], by_name[other]
        gain = 100 * (float(a["dice_mean"]) - float(b["dice_mean"]))
        line = f"{name} minus {other}: {gain:+.1f} Dice points"
        if int(a["seeds"]) > 1:
            spread = max(100 * (float(row["dice_max"]) - float(row["dice_min"])) for row in (a, b))
            line += f", {'more' if abs(gain) > spread else 'not more'} than the spread over seeds, {spread:.1f} points"
        else:
            line += " (with one seed, the spread over seeds is unknown)"
        lines.append(line)
    return lines


def _number(score: Any, factor: float = 1, digits: int = 2) -> str:
    """A score for reading; a dash where it is undefined in every case."""
    value = factor * float(score)
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _cells(row: Row) -> tuple[str, ...]:
    sd = f" ± {100 * float(row['dice_sd']):.1f}" if row["dice_sd"] != "" else ""
    undefined = f" ({row['hd95_undefined']} undefined)" if int(row["hd95_undefined"]) else ""
    return (
        row["method"], METHODS[base_name(row["method"])].description, f"{int(row['trained_numbers']):,}",
        _number(row["dice_mean"], 100, 1) + sd, _number(row["hd95_mm"]) + undefined,
        f"{float(row['seconds']):.0f}",
    )  # fmt: skip


def table(summary: Sequence[Row]) -> Table:
    """The methods side by side for the terminal; ± is the standard deviation over seeds."""
    from rich.box import SIMPLE_HEAD

    rows = [_cells(row) for row in summary]
    title = "Validation, mean over foreground classes"
    return rich_table(HEADER, rows, left=(0, 1), title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def before_text(out: Path) -> str:
    """One sentence on the scores before adaptation."""
    path = out / "before.json"
    if not path.is_file():
        return "before adaptation: no score, because the head for these classes is new"
    scores = read_json(path)
    return f"before adaptation: Dice {100 * scores['dice']:.1f}, HD95 {scores['hd95_mm']:.2f} mm"


def _transformer_text(out: Path) -> str:
    path = out / "transformer.json"
    if not path.is_file():
        return "Whether this network uses its transformer was not measured: no transformer.json beside its weights."
    check = read_json(path)
    trained, random = 100 * check["dice"], 100 * check["dice_with_random_blocks"]
    blocks = get_spec(NetworkConfig.read(out / "network.json").network).blocks_are
    return (
        f"Does the network use its {blocks.removesuffix(' blocks')}? On its source data it reaches {trained:.1f} % "
        f"Dice, and {random:.1f} % after its {blocks} are initialised at random again: they are worth "
        f"{trained - random:.1f} points. Where that difference is small, a comparison of adapters inside them says "
        "little."
    )


def _settings_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = run["data"]
    rows = [
        (f"{name} cases ({len(data[part])})", ", ".join(data[part]))
        for part, name in (("train", "training"), ("val", "validation"))
    ]
    if "selection" in run:
        held = run["selection"]["held_out"]
        rows.append((f"training cases held out, to choose when it is best ({len(held)})", ", ".join(held)))
    rows += [
        (f"{name}, found on folds of the training cases", _text(found)) for name, found in run.get("tuned", {}).items()
    ]
    rows += [(key.replace("_", " "), _text(value)) for key, value in run["settings"].items()]
    return rows + [(f"{name} version", value) for name, value in run["versions"].items()] + [
        ("CPU threads", str(run["threads"])), ("SHA-256 of the data", data["sha256"]),
        ("SHA-256 of the base weights", run["base"]["sha256"]),
    ]  # fmt: skip


def _text(value: Any) -> str:
    """A JSON value for reading."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items()) or "default"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "default" if value is None else str(value)


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_report(out: Path, volumes: Sequence[Volume], predictions: Mapping[str, Sequence[Tensor]]) -> None:
    """Write curves.png, overlays.png and report.html from the files of the run in ``out``.

    Args:
        out: The run folder, with run.json and summary.csv.
        volumes: The validation cases.
        predictions: For each column of overlays.png, the predicted label values (X, Y, Z) of the first cases.
    """
    require_package("jinja2")
    import jinja2

    run, summary = read_json(out / "run.json"), read_csv(out / "summary.csv")
    labels, methods = run["data"]["labels"], [row["method"] for row in summary]
    classes = [labels[value] for value in sorted(labels, key=int) if int(value)]
    draw_curves(out, methods)
    draw_overlays(out, volumes, predictions, classes)
    loader = jinja2.PackageLoader("tcurlora_ext.segmentation.report", "")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = pages.get_template("report.html.j2").render(
        methods=methods,
        source=run["settings"]["data"] or "embedded target domain (MNI152 template)",
        cases={part: len(run["data"][part]) for part in ("train", "val")},
        seeds=int(summary[0]["seeds"]),
        steps=int(summary[0]["steps"]),
        header=HEADER,
        rows=[_cells(row) for row in summary],
        result=result_sentence(out, methods),
        findings=[*comparisons(summary), before_text(out)],
        transformer=_transformer_text(out),
        curves=_data_url(out / "curves.png"),
        overlays=_data_url(out / "overlays.png"),
        class_header=["method", *(f"{score}, {name}" for score in ("Dice %", "HD95 mm") for name in classes)],
        class_rows=[_class_cells(row, classes) for row in summary],
        settings=_settings_rows(run),
    )
    write_bytes(out / "report.html", page.encode())


def _class_cells(row: Row, classes: Sequence[str]) -> list[str]:
    dice = [_number(row[f"dice {name}"], 100, 1) for name in classes]
    return [row["method"], *dice, *(_number(row[f"hd95_mm {name}"]) for name in classes)]
