"""The figures of a comparison: what Dice costs, how it grows with the subjects, and how subjects and steps vary."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.comparing.labels import place_labels, spread
from tcurlora_ext.segmentation.comparing.settings import ALL, Part
from tcurlora_ext.segmentation.methods import METHODS, base_name, folder_name
from tcurlora_ext.segmentation.report.figures import pyplot

Row = Mapping[str, Any]
Point = tuple[int, float, float]  # x, Dice in % and its standard deviation
WIDTH = 6.4  # inches: with letters of 10 points, legible on 400 pixels
DPI = 200
LETTERS = {"font.size": 10.5, "axes.labelsize": 10.5, "axes.titlesize": 11, "figure.dpi": DPI}
# Methods that train the head, the decoder or all, those of tCUR, and others.
MARKERS = {"plain": "s", "tcur": "D", "other": "o"}
KINDS = {"plain": "part or whole of the network", "tcur": "tCUR", "other": "other methods"}


def kind_of(method: str) -> str:
    """The family of a method, by which it gets its marker."""
    if not METHODS[base_name(method)].adapter:
        return "plain"
    return "tcur" if base_name(method).startswith("tcur") else "other"


def _colour(method: str) -> str:
    return METHODS[base_name(method)].colour


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Names for figures: options in a few letters, without files; whole names where that would make two alike."""
    found = {method: _short(method) for method in methods}
    counts = Counter(found.values())
    return {method: name if counts[name] == 1 else method for method, name in found.items()}


def _short(method: str) -> str:
    base, *options = method.split(":")
    pairs = [option.partition("=") for option in options]
    words = [
        name.replace("_", " ") if value == "true" else f"{'r' if name == 'rank' else name}={value}"
        for name, _, value in pairs
        if name != "factors"
    ]
    return " ".join([base, *words])


def _save(plt: Any, figure: Any, path: Path) -> None:
    write_with(path, lambda target: figure.savefig(target, dpi=DPI, facecolor="white"))
    plt.close(figure)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def draw_cost(path: Path, rows: Sequence[Row], column: str, label: str) -> bool:
    """Draw Dice against what a method costs, with the standard deviation over seeds.

    Args:
        path: The PNG to write.
        rows: Of one training set and the label "mean", one for each method.
        column: Of the cost.
        label: Of the axis.

    Returns:
        Whether there was something to draw: two methods whose cost is known.
    """
    figure = cost_figure(rows, column, label)
    if figure is None:
        return False
    _save(pyplot(), figure, path)
    return True


def cost_figure(rows: Sequence[Row], column: str, label: str) -> Any:
    """The matplotlib figure of :func:`draw_cost`, which has the arguments; None where there is nothing to draw."""
    known = [row for row in rows if row[column] != "" and not math.isnan(float(row["dice_mean"]))]
    if len(known) < 2:
        return None
    plt = pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator

    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.6 + 0.09 * max(0, len(known) - 8)), layout="constrained")
        points = [(float(row[column]), 100 * float(row["dice_mean"])) for row in known]
        for row, (x, y) in zip(known, points, strict=True):
            sd = 0.0 if row["dice_sd"] == "" else 100 * float(row["dice_sd"])
            axes.errorbar(
                x, y, yerr=sd, fmt=MARKERS[kind_of(row["method"])], color=_colour(row["method"]), mec="#333333",
                mew=0.6, ms=7, ecolor="#777777", elinewidth=1, capsize=2.5, zorder=3,
            )  # fmt: skip
        costs = [x for x, _ in points]
        if max(costs) > 8 * min(costs):
            axes.set_xscale("log")
            axes.set_xlim(min(costs) / 2.5, max(costs) * 2.5)
            axes.xaxis.set_major_locator(LogLocator(numticks=8))
        else:
            pad = 0.15 * (max(costs) - min(costs)) or 1
            axes.set_xlim(min(costs) - pad, max(costs) + pad)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.margins(y=0.16)
        axes.set(xlabel=label, ylabel="Dice, %")
        _tidy(axes)
        used = dict.fromkeys(kind_of(row["method"]) for row in known)
        handles = [
            plt.Line2D([], [], ls="", marker=MARKERS[kind], color="#bbbbbb", mec="#333333", label=KINDS[kind])
            for kind in used
        ]
        if len(used) > 1:
            figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, handletextpad=0.2)
        spreads = [0.0 if row["dice_sd"] == "" else 100 * float(row["dice_sd"]) for row in known]
        names = short_names([row["method"] for row in known])
        place_labels(axes, points, spreads, list(names.values()), 9.5 if len(known) <= 12 else 8.5)
    return figure


def draw_shots(path: Path, rows: Sequence[Row]) -> None:
    """Draw Dice against the number of training cases, a line for each method.

    The line is over training sets of which each has the cases of the one before it: those of a number of subjects, and
    all cases. Other lists are points of their own, as open markers.

    Args:
        path: The PNG to write.
        rows: Of the label "mean", one for each training set and method.
    """
    series: dict[str, list[Point]] = {}
    lists: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: int(row["training_cases"])):
        point = (int(row["training_cases"]), 100 * float(row["dice_mean"]), 100 * float(row["dice_sd"] or 0))
        nested = row["training_set"] == ALL or str(row["training_set"]).isdecimal()
        (series if nested else lists).setdefault(row["method"], []).append(point)
    label = "training cases" + (" (open: lists of their own)" if lists and series else "")
    _draw_lines(path, series or {name: [] for name in lists}, label, log=True, alone=lists)


def draw_validation(path: Path, part: Part, methods: Sequence[str], seeds: int) -> None:
    """Draw the validation Dice over the steps of training, the mean over seeds.

    Args:
        path: The PNG to write.
        part: The run.
        methods: Its methods.
        seeds: How many.
    """
    series = {}
    for method in methods:
        found: dict[int, list[float]] = {}
        for seed in range(seeds):
            for row in read_csv(part.out / folder_name(method) / f"seed{seed}" / "metrics.csv"):
                if row["val_dice"]:
                    found.setdefault(int(row["step"]), []).append(100 * float(row["val_dice"]))
        series[method] = [
            (step, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            for step, values in sorted(found.items())
        ]
    _draw_lines(path, series, "step", log=False)


def _draw_lines(
    path: Path, series: Mapping[str, Sequence[Point]], label: str, *, log: bool,
    alone: Mapping[str, Sequence[Point]] | None = None,
) -> None:  # fmt: skip
    """Lines with error bars, points without a line, and at the right the names in the order of the lines' ends."""
    alone = alone or {}
    plt = pyplot()
    with plt.rc_context(LETTERS):
        height = max(4.2, 0.22 * len(series) + 1)
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        shown: dict[str, Any] = {}
        for method, line in series.items():
            style = next(shown.setdefault(_colour(method), itertools.cycle(("-", "--", ":", "-."))))
            for points, kind, inside in ((line, style, _colour(method)), (alone.get(method, ()), "", "white")):
                if points:
                    xs, ys, sds = zip(*points, strict=True)
                    axes.errorbar(
                        xs, ys, yerr=sds, color=_colour(method), ls=kind, lw=1.5, marker=MARKERS[kind_of(method)],
                        ms=4.5, mfc=inside, capsize=2, elinewidth=0.8,
                    )  # fmt: skip
        last = {method: [*alone.get(method, ()), *line][-1] for method, line in series.items()}
        ticks = sorted({x for part in (series, alone) for points in part.values() for x, _, _ in points})
        if log and len(ticks) > 1:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.minorticks_off()
        axes.set(xlabel=label, ylabel="Dice, %")
        axes.margins(y=0.08)
        _tidy(axes)
        figure.canvas.draw()
        low, high = axes.get_ylim()
        ends = [y for _, y, _ in last.values()]
        gap = (high - low) * 12.5 / (72 * 0.8 * height)  # of letters of 9 points
        names = short_names(list(series))
        for place, (method, (x, y, _)) in zip(spread(ends, gap), last.items(), strict=True):
            axes.annotate(
                names[method], (x, y), xytext=(1.06, place),
                textcoords=axes.get_yaxis_transform(), va="center", fontsize=9, color="#222222",
                arrowprops={"arrowstyle": "-", "color": _colour(method), "lw": 0.8, "shrinkA": 1, "shrinkB": 3,
                            "relpos": (0, 0.5)},
                annotation_clip=False,
            )  # fmt: skip
        _save(plt, figure, path)


def draw_boxes(path: Path, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the Dice of the subjects by method: a box of the quartiles, whiskers to 1.5 of its length, every subject.

    Args:
        path: The PNG to write.
        scores: Dice, 0 to 1, by method and subject; methods are drawn by their median.
    """
    plt = pyplot()
    values = {m: [100 * v for v in own.values() if not math.isnan(v)] for m, own in scores.items()}
    names = sorted((m for m in values if values[m]), key=lambda m: statistics.median(values[m]))
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, 1.0 + 0.34 * len(names)), layout="constrained")
        drawn = axes.boxplot(
            [values[m] for m in names], orientation="horizontal", widths=0.62, patch_artist=True, showfliers=False,
            medianprops={"color": "#111111", "lw": 1.6}, boxprops={"lw": 0.8}, whiskerprops={"lw": 0.8},
        )  # fmt: skip
        for place, (box, method) in enumerate(zip(drawn["boxes"], names, strict=True), 1):
            box.set_facecolor(_colour(method))
            box.set_alpha(0.75)
            count = len(values[method])
            heights = [place + 0.22 * ((index * 0.618) % 1 - 0.5) for index in range(count)]
            axes.plot(values[method], heights, ls="", marker="o", ms=2.2, color="#222222", alpha=0.55, zorder=3)
        shown = short_names(names)
        axes.set_yticks(range(1, len(names) + 1), [shown[name] for name in names], fontsize=9.5)
        axes.set(xlabel="Dice of a subject, %")
        _tidy(axes)
        _save(plt, figure, path)
