"""The result of a run: summary rows, the table on the terminal, and a report.html that needs no other file."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from tcurlora_ext.io.atomic import write_bytes
from tcurlora_ext.io.records import read_csv, read_json
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.evaluation import finite_mean
from tcurlora_ext.segmentation.figures import draw_curves, draw_overlays
from tcurlora_ext.segmentation.methods import METHODS

Row = Mapping[str, Any]
CELLS = ("method", "trains", "numbers", "Dice %", "HD95 mm", "seconds")


def summarise_runs(results: Sequence[Row]) -> list[dict[str, Any]]:
    """A row a method from a row a (method, seed): means over seeds, and for Dice the sd (n - 1), least and largest."""
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
        })  # fmt: skip
    return rows


def comparisons(summary: Sequence[Row]) -> list[str]:
    """What the adapters gain over the head alone, in Dice points, beside the spread over seeds where there are several.

    The spread is the larger range (largest less least) of the two methods.
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
            line += f", {'more' if abs(gain) > spread else 'not more'} than the spread of {spread:.1f} over seeds"
        else:
            line += " (one seed: no spread known)"
        lines.append(line)
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    sd = f" ± {100 * float(row['dice_sd']):.1f}" if row["dice_sd"] != "" else ""
    undefined = f" ({row['hd95_undefined']} undefined)" if int(row["hd95_undefined"]) else ""
    return (
        row["method"], METHODS[row["method"]].description, f"{int(row['trained_numbers']):,}",
        f"{100 * float(row['dice_mean']):.1f}{sd}", f"{float(row['hd95_mm']):.2f}{undefined}",
        f"{float(row['seconds']):.0f}",
    )  # fmt: skip


def table(summary: Sequence[Row]) -> Table:
    """The methods side by side for the terminal; ± is the standard deviation over seeds."""
    shown = Table(title="Validation, mean over foreground classes")
    for index, cell in enumerate(CELLS):
        shown.add_column(cell, justify="left" if index < 2 else "right", no_wrap=index != 1)
    for row in summary:
        shown.add_row(*_cells(row))
    return shown


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(
            f"<{tag}{' class=l' if i < left else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        ) + "</tr>"  # fmt: skip

    return (
        f"<table><thead>{line(header, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"
    )


STYLE = """
:root { color-scheme: light; } body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
max-width: 60rem; margin: 2rem auto; padding: 0 1rem; } h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; } .l { text-align: left; } img { max-width: 100%; }
.muted { color: #666; } details { margin-top: 1rem; } code { font-size: .9em; } .scroll { overflow-x: auto; }
"""


def before_text(out: Path) -> str:
    """One sentence on the scores before adaptation."""
    path = out / "before.json"
    if not path.is_file():
        return "before adaptation: no score, the head for these classes is new"
    scores = read_json(path)
    return f"before adaptation: Dice {100 * scores['dice']:.1f}, HD95 {scores['hd95_mm']:.2f} mm"


def _transformer_text(out: Path) -> str:
    path = out / "transformer.json"
    if not path.is_file():
        return "Whether this network uses its transformer was not measured: no transformer.json beside its weights."
    check = read_json(path)
    trained, random = 100 * check["dice"], 100 * check["dice_with_random_blocks"]
    return (
        f"Does the network use its transformer? On its source data it reaches {trained:.1f} % Dice, and {random:.1f} % "
        f"with the transformer's blocks as at a random start: the blocks are worth {trained - random:.1f} points. "
        "Where that difference is small, a comparison of adapters inside the blocks says little."
    )


def _settings_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = run["data"]
    rows = [(f"{len(data[part])} {part} cases", ", ".join(data[part])) for part in ("train", "val")]
    rows += [(key, "-" if value is None else str(value)) for key, value in run["settings"].items()]
    return rows + [(f"{name} version", value) for name, value in run["versions"].items()] + [
        ("threads", str(run["threads"])), ("SHA-256 of the data", data["sha256"]),
        ("SHA-256 of the base", run["base"]["sha256"]),
    ]  # fmt: skip


def write_report(out: Path, volumes: Sequence[Volume], predictions: Mapping[str, Sequence[Tensor]]) -> None:
    """curves.png, overlays.png and report.html from the files of the run."""
    run, summary = read_json(out / "run.json"), read_csv(out / "summary.csv")
    labels = run["data"]["labels"]
    classes = [labels[value] for value in sorted(labels, key=int) if int(value)]
    draw_curves(out, [row["method"] for row in summary])
    draw_overlays(out, volumes, predictions, classes)
    seeds = int(summary[0]["seeds"])
    per_class = _html_table(
        ("method", *(f"Dice %, {name}" for name in classes), *(f"HD95 mm, {name}" for name in classes)),
        [
            (row["method"], *(f"{100 * float(row[f'dice {name}']):.1f}" for name in classes),
             *(f"{float(row[f'hd95_mm {name}']):.2f}" for name in classes))
            for row in summary
        ], 1,
    )  # fmt: skip
    source = run["settings"]["data"] or "embedded target domain (MNI152 template)"
    body = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>tcurlora finetune</title>
<style>{STYLE}</style></head><body>
<h1>Adaptation by {", ".join(row["method"] for row in summary)}</h1>
<p class="muted">{html.escape(str(source))}: {len(run["data"]["train"])} training and {
        len(run["data"]["val"])
    } validation
cases, {seeds} seed{"s" if seeds > 1 else ""}, {summary[0]["steps"]} steps each.</p>
<div class="scroll">{_html_table(CELLS, [_cells(row) for row in summary], 2)}</div>
<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in (*comparisons(summary), before_text(out)))}</ul>
<h2>How to read it</h2>
<p>Every method starts from the same base and sees the same windows in the same order. Scores are those of the last
step, read back from the adapter file: no step was chosen by its validation score. Dice (higher is better) and HD95, the
95th percentile of the surface distance (lower is better), are means over cases, then over foreground classes{
        "; ± is the standard deviation over seeds" if seeds > 1 else ""
    }. "Numbers" are the trained ones, the
part trained beside an adapter included. HD95 is undefined, and left out, where a class is absent from the truth or
from the prediction. Seconds are the training steps alone.</p>
<p>{html.escape(_transformer_text(out))}</p>
<h2>Learning curves</h2>{_image(out / "curves.png", "training loss and validation Dice by step")}
<h2>Prediction and truth</h2>{_image(out / "overlays.png", "axial slices with truth and predictions")}
<h2>By class</h2><div class="scroll">{per_class}</div>
<details><summary>Settings, versions, cases</summary>
<div class="scroll">{_html_table(("", ""), _settings_rows(run), 2)}</div></details>
</body></html>
"""
    write_bytes(out / "report.html", body.encode())
