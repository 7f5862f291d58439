"""The pictures of ``tcurlora inspect``, each of one stack; legible from one to some hundred slices with long names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from tcurlora_ext.analysis.inspection import StackInspection

BASE, SELECTED = "#9aa5b1", "#c2410c"
CORE, DELTA = r"$\|U_l\|_F$", r"$\|\Delta W_l\|_F$"


def draw(one: StackInspection) -> Iterator[tuple[str, Figure]]:
    """Pairs of a picture's kind and the picture: "layers", "frequencies", "scores".

    There are no frequencies of the identity transform or of a single slice, and no scores where factors are learned.
    """
    yield "layers", _layers(one)
    if len(one.core_energy) > 1:
        yield "frequencies", _frequencies(one)
    if one.columns and one.rows:
        yield "scores", _scores(one)


def _figure(width: float, height: float, title: str) -> Figure:
    """A figure of this size in inches, or as wide as its title needs: 0.09 inches per character at 11 points."""
    figure = Figure(figsize=(max(width, 0.3 + 0.09 * len(title)), height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _grid(names: list[str]) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Slices on a grid of blocks x roles: "vit.blocks.3.attn.qkv[0]" is in row "vit.blocks.3", column "attn.qkv[0]".

    Returns:
        The names of the rows, the names of the columns, and the (row, column) of each slice.
    """
    blocks: dict[str, int] = {}
    roles: dict[str, int] = {}
    places = []
    for name in names:
        match = re.match(r"(.*(?:^|\.)\d+)\.(?=\D)(.+)", name)
        block, role = match.groups() if match else (name, "")
        places.append((blocks.setdefault(block, len(blocks)), roles.setdefault(role, len(roles))))
    return list(blocks), list(roles), places


def _layers(one: StackInspection) -> Figure:
    """Heat map of |dW_l|_F, or of |U_l|_F without base weights, with the values in the cells."""
    base = one.base
    values, label = (one.core_norms, CORE) if base is None else (base.delta_norms, DELTA)
    blocks, roles, places = _grid(one.names)
    grid = np.full((len(blocks), len(roles)), np.nan)
    for place, value in zip(places, values, strict=True):
        grid[place] = value
    name_width = 0.08 * max(map(len, blocks))
    figure = _figure(
        max(5.0, 2.2 + name_width + 1.0 * len(roles)),
        max(2.8, 1.7 + 0.3 * len(blocks)),
        f"stack {one.name}: {label} of every slice",
    )
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=np.nanmax(grid) or 1.0)
    axes.set_xticks(
        range(len(roles)), roles, rotation=30 if len(roles) > 2 else 0, ha="right" if len(roles) > 2 else "center"
    )
    axes.set_yticks(range(len(blocks)), blocks, fontsize=9)
    low = np.nanmax(grid) / 2
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value) and grid.size <= 400:
            axes.text(
                column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color="w" if value <= low else "k"
            )
    figure.colorbar(image, label=label)
    return figure


def _frequencies(one: StackInspection) -> Figure:
    """Bars: each frequency's share of |U|^2 and, with base weights, of the sum of |dW_l|^2."""
    series = [(r"$\|U\|^2$", one.core_energy, BASE)]
    if one.base is not None:
        series.append((r"$\sum_l \|\Delta W_l\|^2$", one.base.delta_energy, SELECTED))
    count = len(one.core_energy)
    figure = _figure(
        min(14.0, max(5.0, 2 + 0.28 * count * len(series))), 3.8, f"stack {one.name}: energy per frequency"
    )
    axes = figure.subplots()
    width = 0.8 / len(series)
    for index, (label, energy, colour) in enumerate(series):
        total = sum(energy) or 1.0
        at = np.arange(count) + (index - (len(series) - 1) / 2) * width
        axes.bar(at, [100 * value / total for value in energy], width, label=label, color=colour)
    axes.margins(x=0.02)
    axes.set_xlabel("frequency k along the slices\n(k = 0 is the part that all slices share)")
    axes.set_ylabel("share of the energy, %")
    step = max(1, count // 30)
    axes.set_xticks(range(0, count, step))
    axes.legend()
    return figure


def _scores(one: StackInspection) -> Figure:
    """The scores of the selected features; with base weights, their norm scores among those of all features."""
    figure = _figure(9.0, 6.0, f"stack {one.name}: features selected by the rule '{one.selection}'")
    top, bottom = figure.subplots(2)
    base = one.base
    score_name = "score" if base is None else "norm score"
    sides = (
        (top, one.columns, one.column_scores, None if base is None else base.column_scores),
        (bottom, one.rows, one.row_scores, None if base is None else base.row_scores),
    )
    for (axes, ids, scores, of_all), heading, labels in zip(sides, one.headings, one.labels, strict=True):
        heights = scores if of_all is None else [of_all[index] for index in ids]
        if of_all is not None:
            axes.plot(range(len(of_all)), of_all, color=BASE, linewidth=0.8, label="all")
            axes.margins(x=0.01)
        axes.vlines(ids, 0, heights, color=SELECTED, linewidth=1.0, alpha=0.5)
        axes.plot(ids, heights, "o", color=SELECTED, markersize=4, label="selected")
        for label, index, height in zip(labels, ids, heights, strict=True):
            axes.annotate(label, (index, height), xytext=(3, 3), textcoords="offset points", fontsize=7)
        axes.set_ylim(bottom=0, top=1.12 * max([*heights, *(of_all or ())]) or 1.0)
        axes.set_xlabel(f"{heading} and tap" if any("tap" in label for label in labels) else heading)
        axes.set_ylabel(score_name)
        axes.legend(loc="lower right", fontsize=8)
    return figure
