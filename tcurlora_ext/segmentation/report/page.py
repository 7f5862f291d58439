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
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.methods import METHODS, base_name
from tcurlora_ext.segmentation.metrics.evaluation import finite_mean
from tcurlora_ext.segmentation.networks import NetworkConfig, get_spec
from tcurlora_ext.segmentation.packages import require_package
from tcurlora_ext.segmentation.report.cells import hd95, in_lines, number, results_table, table_notes, with_sd
from tcurlora_ext.segmentation.report.figures import draw_curves
from tcurlora_ext.segmentation.report.findings import result_sentence
from tcurlora_ext.segmentation.report.overlays import draw_overlays

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
HEADER = (
    "method", "what trains", "trained parameters", "Dice %", "HD95 mm", "file KB", "step ms", "memory MiB",
    "warm-up steps", "seconds",
)  # fmt: skip
IN_TERMINAL = (2, 3, 4, 5, 6, 7)  # columns after the method


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
            **{key: _measured([row.get(key) for row in runs]) for key in ("step_ms", "step_mib", "gpu_peak_mib")},
        })  # fmt: skip
    return rows


def _measured(values: Sequence[float | None]) -> float | str:
    """The mean of what was measured, rounded; empty where nothing was."""
    mean = finite_mean([value for value in values if value is not None])
    return "" if math.isnan(mean) else round(mean, 3)


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


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["method"], METHODS[base_name(row["method"])].description, f"{int(row['trained_numbers']):,}",
        with_sd(row["dice_mean"], row["dice_sd"], 100), hd95(row, number(row["hd95_mm"])),
        number(row["adapter_bytes"], 1e-3, 1), number(row["step_ms"], 1, 0),
        number(row["gpu_peak_mib"] or row["step_mib"], 1, 1), str(row["warm_up_steps"]), f"{float(row['seconds']):.0f}",
    )  # fmt: skip


def table(summary: Sequence[Row]) -> Table:
    """The methods side by side for a terminal of 80 columns; ± is the standard deviation over seeds."""
    rows = [[in_lines(row["method"], 18), *(_cells(row)[at] for at in IN_TERMINAL)] for row in summary]
    header = ("method", *(HEADER[at].replace(" ", "\n", 1) for at in IN_TERMINAL))
    return results_table(header, rows, "Validation, mean over foreground classes", 0, table_notes(summary))


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


def settings_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What run.json says of a run, for a table with names and values."""
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


def data_url(path: Path) -> str:
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def least_width(path: Path) -> int:
    """How wide a picture of 130 dpi has to be on a page, in rem: letters of 8 points are 9 pixels high then."""
    pixels = int.from_bytes(path.read_bytes()[16:20], "big")  # of a PNG
    return round(0.6 * pixels / 16)


def write_report(out: Path, volumes: Sequence[Volume], predictions: Mapping[str, Sequence[Tensor]]) -> None:
    """Write curves.png, overlays.png and report.html from the files of the run in ``out``.

    Args:
        out: The run folder, with run.json and summary.csv.
        volumes: The validation cases.
        predictions: For each column of overlays.png, the predicted label values (X, Y, Z) of the first cases.
    """
    run, summary = read_json(out / "run.json"), read_csv(out / "summary.csv")
    labels, methods = run["data"]["labels"], [row["method"] for row in summary]
    classes = [labels[value] for value in sorted(labels, key=int) if int(value)]
    draw_curves(out, methods)
    draw_overlays(out, volumes, predictions, classes)
    content = render(
        "report.html.j2",
        methods=methods,
        source=run["settings"]["data"] or "embedded target domain (MNI152 template)",
        cases={part: len(run["data"][part]) for part in ("train", "val")},
        seeds=int(summary[0]["seeds"]),
        steps=int(summary[0]["steps"]),
        header=HEADER,
        rows=[_cells(row) for row in summary],
        notes=table_notes(summary),
        result=result_sentence(out, methods, {row["method"]: int(row["warm_up_steps"] or 0) for row in summary}),
        findings=[*comparisons(summary), before_text(out)],
        transformer=_transformer_text(out),
        curves=data_url(out / "curves.png"),
        overlays=data_url(out / "overlays.png"),
        widths={name: least_width(out / f"{name}.png") for name in ("curves", "overlays")},
        class_header=["method", *(f"{score}, {name}" for score in ("Dice %", "HD95 mm") for name in classes)],
        class_rows=[_class_cells(row, classes) for row in summary],
        settings=settings_rows(run),
    )
    write_bytes(out / "report.html", content)


def render(template: str, **values: Any) -> bytes:
    """A page of this folder's templates with these values."""
    require_package("jinja2")
    import jinja2

    loader = jinja2.PackageLoader("tcurlora_ext.segmentation.report", "")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return pages.get_template(template).render(**values).encode()


def _class_cells(row: Row, classes: Sequence[str]) -> list[str]:
    dice = [number(row[f"dice {name}"], 100, 1) for name in classes]
    return [row["method"], *dice, *(number(row[f"hd95_mm {name}"]) for name in classes)]
