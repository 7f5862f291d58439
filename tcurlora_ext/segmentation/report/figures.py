"""Learning curves of a run, and what its figures have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.methods import METHODS, base_name, folder_name
from tcurlora_ext.segmentation.packages import require_package


def pyplot() -> Any:
    """matplotlib.pyplot with the Agg backend, which needs no display."""
    require_package("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def trailing_mean(values: np.ndarray, width: int = 10) -> np.ndarray:
    """The mean of each value and those before it, `width` in all; of fewer at the beginning. Shape (N,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - width + 1, 0)
    mean: np.ndarray = (total[1:] - total[first]) / (np.arange(len(values)) + 1 - first)
    return mean


def draw_curves(out: Path, methods: Sequence[str]) -> None:
    """Draw curves.png: training loss (mean of the last 10 steps) and validation Dice over steps, one line per seed."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shown: dict[str, Iterator[int]] = {}
    for method in methods:
        colour, own = METHODS[base_name(method)].colour, folder_name(method)
        # A method that runs with several options has one colour, and another dash for each.
        line = ("-", "--", ":", "-.")[next(shown.setdefault(base_name(method), itertools.count())) % 4]
        for index, path in enumerate(sorted((out / own).glob("seed*/metrics.csv"))):
            rows = read_csv(path)
            trained = [row for row in rows if row["loss"]]  # there is none before the first step
            steps = np.array([int(row["step"]) for row in trained])
            loss = np.array([float(row["loss"]) for row in trained])
            left.plot(steps, trailing_mean(loss), color=colour, ls=line, lw=1.4, label=None if index else method)
            points = [(int(row["step"]), 100 * float(row["val_dice"])) for row in rows if row["val_dice"]]
            right.plot(
                *zip(*points, strict=True),
                color=colour,
                ls=line,
                lw=1.4,
                marker="o",
                ms=4,
                label=None if index else method,
            )
    left.set(xlabel="step", ylabel="Dice + cross-entropy", title="Training loss, mean of the last 10 steps")
    right.set(xlabel="step", ylabel="Dice, %", title="Validation Dice, mean over all cases")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", frameon=False)
    write_with(out / "curves.png", lambda path: figure.savefig(path, dpi=130))
    plt.close(figure)
