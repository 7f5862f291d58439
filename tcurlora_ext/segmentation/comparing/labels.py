"""Names beside the points of a figure, placed so that they cover neither each other nor the points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

DISTANCES = (5, 9, 14, 20, 27, 35, 45, 57, 70)  # in points, from a point to the nearest edge of its name
DIRECTIONS = 24
Box = tuple[float, float, float, float]  # left, lower, right, upper in pixels


def place_labels(
    axes: Any, points: Sequence[tuple[float, float]], spreads: Sequence[float], names: Sequence[str], size: float
) -> None:  # fmt: skip
    """Write a name beside each point, the crowded ones first, with a thin line to the point where it is further away.

    Args:
        axes: With its limits and scales set, in a figure whose resolution is that of its file.
        points: In data coordinates.
        spreads: Half the heights of the points' error bars.
        names: One for each point.
        size: Of the letters in points.
    """
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    point = figure.dpi / 72  # in pixels
    at = axes.transData.transform(np.asarray(points, float))
    ends = axes.transData.transform([(x, y + half) for (x, y), half in zip(points, spreads, strict=True)])
    room = axes.get_window_extent(renderer)
    marks, bars = 4.5 * point, ends[:, 1] - at[:, 1]
    taken: list[Box] = [(x - marks, y - marks, x + marks, y + marks) for x, y in at]
    taken += [(x - point, y - bar, x + point, y + bar) for (x, y), bar in zip(at, bars, strict=True)]
    near = [int((np.hypot(*(at - place).T) < 45 * point).sum()) for place in at]
    for index in sorted(range(len(names)), key=lambda index: -near[index]):
        text = axes.annotate(
            names[index], points[index], xytext=(0, 0), textcoords="offset points", fontsize=size, ha="center",
            va="center", linespacing=1.0,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        text.set_in_layout(False)
        half = (extent.width / 2 + point, extent.height / 2)
        distances = [distance * point for distance in DISTANCES]
        box, moved, distance = _best(tuple(at[index]), half, taken, (room.x0, room.y0, room.x1, room.y1), distances)
        text.xyann = (moved[0] / point, moved[1] / point)
        taken.append(box)
        if distance > distances[1]:
            x, y = at[index]
            end = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            line = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*line.T, color="#888888", lw=0.7, zorder=1, scalex=False, scaley=False)


def _best(
    point: tuple[float, float], half: tuple[float, float], taken: Sequence[Box], room: Box, distances: Sequence[float]
) -> tuple[Box, tuple[float, float], float]:  # fmt: skip
    """The place that covers least, the nearest of equal ones: its box, its offset from the point, its distance."""
    best: tuple[float, Box, tuple[float, float], float] | None = None
    for distance, step in itertools.product(distances, range(DIRECTIONS)):
        angle = 2 * math.pi * step / DIRECTIONS
        move = (math.cos(angle) * (half[0] + distance), math.sin(angle) * (half[1] + distance))
        x, y = point[0] + move[0], point[1] + move[1]
        box = (x - half[0], y - half[1], x + half[0], y + half[1])
        covered = sum(_overlap(box, other) for other in taken) + (half[0] * half[1] * 4 - _overlap(box, room))
        if best is None or covered < best[0] - 1e-9:
            best = (covered, box, move, distance)
        if covered < 1e-9:
            break
    assert best is not None
    return best[1], best[2], best[3]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved apart as little as one pass from each end can, so that neighbours differ by at least a gap."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = [values[index] for index in order]
    for _ in range(200):
        moved = False
        for lower, upper in itertools.pairwise(range(len(places))):
            lack = gap - (places[upper] - places[lower])
            if lack > 1e-9:
                places[lower] -= lack / 2
                places[upper] += lack / 2
                moved = True
        if not moved:
            break
    found = [0.0] * len(values)
    for place, index in zip(places, order, strict=True):
        found[index] = place
    return found
