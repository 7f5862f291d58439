"""Figures of the README and the docs, from result files alone.

    python -m tcurlora_ext.bench.reading.plot [RESULTS] [--output FOLDER]

For every device's folder in RESULTS it draws quick-time.png and quick-memory.png from quick.csv, the same from gpu.csv,
and growth.png from growth.csv, and for every comparison in RESULTS/segmentation it draws parameters.png from
summary.csv, where these files exist. A picture's metadata holds its file's name and hash
(:func:`source`) and no date: the same results give the same bytes, and a picture of older results can be recognised.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.comparing.figures import cost_figure
from tcurlora_ext.segmentation.report.figures import pyplot

from ..entry import run_command
from ..names import DENSE, FROZEN, LORA, TRANSIENT
from ..rows import Row, by_case, labels, number, read_failures, read_results, tcur_backend, value
from .crossover import Crossover, crossovers, curves
from .styles import style, style_order

COMMAND = "python -m tcurlora_ext.bench.reading.plot"
# Used instead of the user's matplotlibrc. Sizes in points, for a figure 9 inches wide.
LOOK = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 9, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "axes.axisbelow": True, "savefig.dpi": 120,
}  # fmt: skip
PANELS = (
    ("tokens", "training", "tokens T, training"),
    ("tokens", "inference", "tokens T, inference"),
    ("rank", "training", "tubal rank r"),
    ("slices", "training", "slices S of the stack"),
    ("width", "training", "width of the layer, in = out"),
)
POINT = {"slices": "stack", "width": "in"}  # the column of a sweep's axis where that is not the sweep's name


def draw(results: Path, output: Path, log: Callable[[str], None] = print) -> list[Path]:
    """Draw all figures of a folder of results as output/<device folder>/<figure>.png.

    Args:
        results: Holds one folder per device.
        output: Gets one folder per device and comparison.
        log: Called with a line of text for every row of a file that failed and is not drawn.

    Returns:
        The paths of the figures.

    Raises:
        OSError: The folder is not there or has no result file that is drawn.
        ValueError: A file is not a result file; the message says what was found and what was expected.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"{results}: no such folder, expected a folder for each device in it")
    written = []
    for path in sorted(results.glob("segmentation/comparison-*/summary.csv")):
        plt = pyplot()
        with plt.rc_context({**plt.rcParamsDefault, "backend": "agg"}):
            figure = cost_figure(read_csv(path), "trained_numbers", "trained parameters")
            if figure is not None:
                written.append(_write(figure, path, output, "parameters.png"))
    failed: dict[str, None] = {}  # several figures have the same file
    for file, name, make in _drawings():
        for path in sorted(results.glob(f"*/{file}")):
            rows = read_results(path)
            failed |= dict.fromkeys(f"{path}: failed, not drawn: {line}" for line in read_failures(path))
            plt = pyplot()
            with plt.rc_context({**plt.rcParamsDefault, "backend": "agg", **LOOK}):
                try:
                    figure = make(plt, rows)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                written.append(_write(figure, path, output, name))
    if not written:
        raise FileNotFoundError(
            f"{results}: found no */quick.csv, */gpu.csv, */growth.csv or comparison, expected one at least"
        )
    for line in failed:
        log(line)
    return written


def _write(figure: Any, path: Path, output: Path, name: str) -> Path:
    """Write the figure of a result file; returns where."""
    target = output / path.parent.name / name
    write_with(target, partial(figure.savefig, metadata={"Software": None, "Source": source(path)}))
    pyplot().close(figure)
    return target


def source(path: Path) -> str:
    """The result file of a picture as its metadata names it: its folder, its name and its hash."""
    return f"{path.parent.name}/{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _drawings() -> Iterator[tuple[str, str, Any]]:
    """Result file, picture, and the function that draws it from pyplot and rows."""
    for name in ("quick", "gpu"):
        yield f"{name}.csv", f"{name}-time.png", times
        yield f"{name}.csv", f"{name}-memory.png", memory
    yield "growth.csv", "growth.png", growth


def times(plt: Any, rows: list[Row]) -> Any:
    """Time relative to the frozen network's: one panel per case, one line per variant, 20th to 80th percentile."""
    cases = by_case(rows)
    names, shared = labels(rows)
    variants = sorted({row["variant"] for row in rows} - {FROZEN}, key=style_order)
    across = min(4, len(cases))
    down = math.ceil(len(cases) / across)
    figure, grid = plt.subplots(
        down, across, figsize=(9, 0.9 + down * (0.5 + 0.19 * len(variants))), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (at, variant_rows) in zip(grid.flat, cases.items(), strict=False):
        axes.set_title(names[at].replace(" T=", "\nT="))
        axes.axvline(1, color=style(FROZEN)[0], lw=1)
        for place, name in enumerate(variants):
            if name in variant_rows and value(variant_rows[name], "over_frozen") is not None:
                _dot(axes, place, variant_rows[name])
        axes.set_xlim(left=min(0.95, axes.get_xlim()[0]))
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    for index in range(across):
        below = max(row for row in range(down) if row * across + index < len(cases))
        grid[below, index].set_xlabel("time / frozen")
    _variant_axis(grid[0, 0], variants)
    figure.suptitle(f"Time of a step over that of the frozen network ({shared}), median and 20th to 80th percentile")
    return figure


def _dot(axes: Any, place: int, row: Row) -> None:
    colour, marker = style(row["variant"])
    low, middle, high = (number(row, f"over_frozen{end}") for end in ("_p20", "", "_p80"))
    axes.plot([low, high], [place, place], color="#555555", lw=1.2, zorder=2)
    axes.plot(middle, place, marker=marker, color=colour, mec="#333333", mew=0.6, ms=6, ls="", zorder=3)


def _variant_axis(axes: Any, variants: Sequence[str]) -> None:
    """Label the axis by the variants' names, the first at the top; axes that share it follow."""
    axes.set_yticks(range(len(variants)), variants)
    axes.set_ylim(len(variants) - 0.5, -0.5)


def memory(plt: Any, rows: list[Row]) -> Any:
    """Extra peak and bytes saved for backward by variant, one row of panels per network; without networks, per case."""
    networks = [row for row in rows if row["network"] not in ("layer", "stack")] or rows
    cases = by_case([row for row in networks if row["mode"] == "training"] or networks)
    names, shared = labels(rows)
    variants = sorted({row["variant"] for row in networks}, key=style_order)
    figure, grid = plt.subplots(
        len(cases), 2, figsize=(9, 0.7 + len(cases) * (0.6 + 0.19 * len(variants))), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    labels_ = {
        "extra_peak_mib": "peak of a step beyond the frozen network's, MiB",
        "saved_mib": "saved for backward, MiB",
    }
    for line, (at, variant_rows) in zip(grid, cases.items(), strict=True):
        for axes, (column, label) in zip(line, labels_.items(), strict=True):
            points = {name: value(row, column) for name, row in variant_rows.items()}
            if column == "extra_peak_mib":
                points.pop(FROZEN, None)  # 0 by definition
            found = {name: amount for name, amount in points.items() if amount is not None}
            for name, amount in found.items():
                colour, marker = style(name)
                axes.plot(
                    amount, variants.index(name), marker=marker, color=colour, mec="#333333", mew=0.6, ms=6, ls=""
                )
            if found and min(found.values()) > 0 and max(found.values()) > 8 * min(found.values()):
                axes.set_xscale("log")
                _decimal_ticks(plt, axes.xaxis)
            axes.set(title=names[at], xlabel=label)
    _variant_axis(grid[0, 0], variants)
    figure.suptitle(f"Memory ({shared}); what compiled variants save is unknown")
    return figure


def growth(plt: Any, rows: list[Row]) -> Any:
    """Time and peak memory of a step against tokens, rank, slices and width, and where building dW becomes cheaper."""
    swept = [row for row in rows if row["sweep"]]
    if not swept:
        raise ValueError("found no row of a sweep, expected some of tokens, rank, slices and width")
    backend = tcur_backend(swept)
    points = {
        (sweep, mode): [r for r in swept if (r["sweep"], r["mode"]) == (sweep, mode)] for sweep, mode, _ in PANELS
    }
    panels = [panel for panel in PANELS if points[panel[:2]]]
    figure, grid = plt.subplots(
        len(panels), 2, figsize=(9, 1.0 + 2.1 * len(panels)), squeeze=False, layout="constrained"
    )  # fmt: skip
    crossings = {(one.mode, one.dense): one for one in crossovers(swept)}
    variants = [FROZEN, LORA, backend, DENSE, TRANSIENT]
    for (left, right), (sweep, mode, label) in zip(grid, panels, strict=True):
        there = [name for name in variants if any(row["variant"] == name for row in points[sweep, mode])]
        for name in there:
            at, (side,) = curves(points[sweep, mode], [name], POINT.get(sweep, sweep))
            colour, marker = style(name)
            for axes, column in ((left, "median_ms"), (right, "peak_mib")):
                axes.plot(
                    at, [number(row, column) for row in side], color=colour, marker=marker, ms=4, lw=1.4, label=name
                )
        for axes, unit in ((left, "time, ms"), (right, "peak memory, MiB")):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set(xlabel=label, ylabel=unit)
            axes.set_xticks(at, [f"{x:,.0f}" for x in at])
            axes.xaxis.minorticks_off()
            _decimal_ticks(plt, axes.yaxis)
        if sweep == "tokens" and (mode, DENSE) in crossings:
            _mark(left, crossings[mode, DENSE])
    usual = {
        column: statistics.mode(row[column] for row in swept) for column in ("tokens", "rank", "stack", "in", "out")
    }
    about = "{case}, {dtype}; unless it varies T={tokens}, r={rank}, S={stack}, {in} to {out} features"
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), title=about.format(**swept[0] | usual), title_fontsize=10,
        loc="outside upper center", ncols=len(variants), frameon=False,
    )  # fmt: skip
    return figure


def _decimal_ticks(plt: Any, axis: Any) -> None:
    """Ticks 1, 2, 5, 10, ... on a logarithmic axis, written as decimals; a finer series where its range is small."""
    low, high = axis.get_data_interval()
    axis.set_major_locator(
        plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 6))
    )
    axis.set_major_formatter(plt.matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    axis.minorticks_off()


def _mark(axes: Any, one: Crossover) -> None:
    """The crossover as two vertical lines, by measured times and by counted FLOPs; one off the axis is left out."""
    lines = sorted([(one.measured, "-", "measured"), (one.counted, "--", "by FLOPs")])
    colour = style(one.dense)[0]
    for (at, line, name), left in zip(lines, (True, False), strict=True):
        if one.lowest <= at <= one.highest:
            axes.axvline(at, color=colour, lw=1, ls=line)
            axes.annotate(
                f"{name}\n{at:,.0f}", (at, 0.98 if left else 0.02), xycoords=("data", "axes fraction"),
                xytext=(-4 if left else 4, 0), textcoords="offset points", fontsize=8, color=colour,
                va="top" if left else "bottom", ha="right" if left else "left",
            )  # fmt: skip


def plot(
    results: Annotated[Path, typer.Argument(metavar="[RESULTS]", help="Holds one folder per device.")] = Path(
        "bench/results"
    ),
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Gets one folder per device.")] = Path("docs/figures"),
) -> None:
    """Draw the figures of the docs from result files."""
    typer.echo("\n".join(map(str, draw(results, output))))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command: 2 for wrong input."""
    return run_command(plot, arguments, COMMAND)


if __name__ == "__main__":
    sys.exit(main())
