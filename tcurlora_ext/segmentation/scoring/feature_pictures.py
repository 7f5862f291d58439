"""Pictures of chosen features, each beside its control: what is lost without them, and where they are active."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.report.figures import pyplot
from tcurlora_ext.segmentation.report.overlays import AXIAL, class_colours, draw_slice, mark

from .features import CHOSEN, RANDOM, SIDES, Activity, Row

COLOURS = {CHOSEN: "#d55e00", RANDOM: "#7f7f7f"}
NAMES = {CHOSEN: "a chosen feature", RANDOM: "a random direction"}
MARKERS = dict(zip(SIDES, "o^", strict=True))
SHOWN = 6  # maps of each kind


def draw_contributions(path: Path, rows: Sequence[Row], labels: Sequence[str], title: str) -> None:
    """Draw the Dice lost without each slot and without random directions, over the share of the core that is gone.

    Args:
        path: The PNG to write.
        rows: Of :func:`~tcurlora_ext.segmentation.scoring.features.contributions`.
        labels: Names of the foreground classes, a row of panels for each; a column for each stack.
        title: Above the picture.
    """
    plt = pyplot()
    names = list(dict.fromkeys(row["stack"] for row in rows))
    figure, grid = plt.subplots(
        len(labels), len(names), figsize=(0.8 + 3.0 * len(names), 1.1 + 2.6 * len(labels)), squeeze=False,
        sharey="row", layout="constrained",
    )  # fmt: skip
    for line, label in zip(grid, labels, strict=True):
        for axes, name in zip(line, names, strict=True):
            axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
            for kind, side in ((kind, side) for kind in (RANDOM, CHOSEN) for side in SIDES):
                own = [row for row in rows if (row["stack"], row["kind"], row["side"]) == (name, kind, side)]
                axes.scatter(
                    [100 * row["share"] for row in own], [100 * row[f"lost {label}"] for row in own],
                    marker=MARKERS[side], color=COLOURS[kind], s=22, alpha=0.85, lw=0,
                    label=f"{NAMES[kind]}, {side}",
                )  # fmt: skip
            axes.set_title(f"stack {name}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("share of the core that is gone, %", fontsize=9)
        line[0].set_ylabel(f"Dice lost, points\n{label}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    write_with(path, lambda target: figure.savefig(target, dpi=130))
    plt.close(figure)


def draw_activity(path: Path, volume: Volume, found: Activity, spacing: Sequence[float], title: str) -> None:
    """Draw activation maps of chosen rows above those of random rows, on the axial slice with most foreground.

    All maps have one scale of colours, from the 99th percentile of their absolute values, symmetric around zero.

    Args:
        path: The PNG to write.
        volume: The case.
        found: The maps.
        spacing: Voxel size of the volume's image in mm.
        title: Above the picture.
    """
    plt = pyplot()
    half = len(found.maps) // 2
    count = min(SHOWN, half)
    labels = np.maximum(np.asarray(volume.label)[0].astype(int), 0)  # below 0: ignored
    grey, maps = np.asarray(volume.image)[0], np.asarray(found.maps)
    colours, index = class_colours(range(labels.max() + 1)), AXIAL.fullest(labels)
    limit = float(np.percentile(np.abs(maps), 99)) or 1.0
    figure, grid = plt.subplots(
        2, count + 1, figsize=(1.0 + 1.5 * (count + 1), 4.4), squeeze=False, layout="constrained"
    )  # fmt: skip
    for line, kind, first in zip(grid, (CHOSEN, RANDOM), (0, half), strict=True):
        draw_slice(line[0], AXIAL, index, grey, labels, spacing, colours)
        line[0].set_ylabel("chosen rows" if kind == CHOSEN else "control: random rows", fontsize=9)
        for axes, at in zip(line[1:], range(first, first + count), strict=True):
            draw_slice(axes, AXIAL, index, grey, labels, spacing, colours)
            image = axes.imshow(
                AXIAL.plane(maps[at], index), cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", alpha=0.75,
                aspect=axes.get_aspect(), interpolation="nearest",
            )  # fmt: skip
            feature = found.features[at]
            name = f"direction {at}" if feature is None else f"feature {feature}"
            axes.set_title(f"{name}\nseparation {found.separation[at]:.2f}", fontsize=8)
        mean = np.nanmean(found.separation[first : first + half])
        mark(line[0], AXIAL, spacing[AXIAL.across] * labels.shape[AXIAL.across])
        line[0].set_title(f"mean of {half}:\nseparation {mean:.2f}", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.7, label="row of unit length times input")
    figure.suptitle(title, fontsize=10)
    write_with(path, lambda target: figure.savefig(target, dpi=130))
    plt.close(figure)
