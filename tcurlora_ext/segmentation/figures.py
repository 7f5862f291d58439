"""Figures of a run: learning curves, and predictions and truth drawn over slices of the images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.methods import METHODS, base_name, folder_name
from tcurlora_ext.segmentation.packages import require_package

# Okabe and Ito's colours, which colour-blind readers can tell apart.
CLASS_COLOURS = ("#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#f0e442", "#0072b2", "#d55e00")


def pyplot() -> Any:
    """matplotlib.pyplot with the Agg backend, which needs no display."""
    require_package("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(out: Path, methods: Sequence[str]) -> None:
    """Draw curves.png: training loss (moving mean of 10 steps) and validation Dice over steps, one line per seed."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shown: dict[str, Iterator[int]] = {}
    for method in methods:
        colour, own = METHODS[base_name(method)].colour, folder_name(method)
        # A method that runs with several options has one colour, and another dash for each.
        line = ("-", "--", ":", "-.")[next(shown.setdefault(base_name(method), itertools.count())) % 4]
        for index, path in enumerate(sorted((out / own).glob("seed*/metrics.csv"))):
            rows = read_csv(path)
            steps = np.array([int(row["step"]) for row in rows])
            loss = np.array([float(row["loss"]) for row in rows])
            width = min(10, len(loss))
            smooth = np.convolve(loss, np.ones(width) / width, "valid")
            left.plot(steps[width - 1 :], smooth, color=colour, ls=line, lw=1.4, label=None if index else method)
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
    left.set(xlabel="step", ylabel="Dice + cross-entropy", title="Training loss, moving mean of 10 steps")
    right.set(xlabel="step", ylabel="Dice, %", title="Validation Dice (up to 4 cases)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", frameon=False)
    write_with(out / "curves.png", lambda path: figure.savefig(path, dpi=130))
    plt.close(figure)


def _slice(volume: NDArray[Any], index: int) -> NDArray[Any]:
    """An axial slice of an RAS volume, with the front of the head up and the subject's left on the viewer's right."""
    return np.asarray(volume[::-1, :, index].T)


def _blend(grey: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """A slice in RGB; in the voxels of a class, 45 % of the image's grey and 55 % of the class's colour."""
    from matplotlib.colors import to_rgb

    rgb = np.repeat(grey[..., None], 3, axis=2)
    for value in range(1, int(labels.max()) + 1):
        colour = np.array(to_rgb(CLASS_COLOURS[(value - 1) % len(CLASS_COLOURS)]))
        where = labels == value
        rgb[where] = 0.45 * rgb[where] + 0.55 * colour
    return rgb


def _grey(volume: Volume) -> NDArray[Any]:
    """The first channel on the truth's grid, with the 1st percentile at 0 and the 99th at 1."""
    from monai.transforms.spatial.array import ResampleToMatch

    image: Any = volume.image[:1]
    if image.shape[1:] != volume.truth.shape[1:]:
        image = ResampleToMatch(mode="bilinear", padding_mode="border")(image, volume.truth)
    values = np.asarray(image)[0]
    low, high = np.percentile(values, (1, 99))
    return np.asarray(((values - low) / max(high - low, 1e-6)).clip(0, 1))


def draw_overlays(out: Path, volumes: Sequence[Volume], predictions: Mapping[str, Sequence[Tensor]],
                  classes: Sequence[str]) -> None:  # fmt: skip
    """Draw overlays.png: one row per case, with image, truth and predictions on the slice with most foreground."""
    plt = pyplot()
    from matplotlib.patches import Patch

    rows = len(next(iter(predictions.values())))
    columns = ["image", "truth", *predictions]
    figure, grid = plt.subplots(
        rows, len(columns), figsize=(1.75 * len(columns), 1.95 * rows + 0.5), squeeze=False, layout="constrained"
    )  # fmt: skip
    for row, volume in enumerate(volumes[:rows]):
        truth, grey = np.maximum(np.asarray(volume.truth)[0].astype(int), 0), _grey(volume)  # below 0: ignored
        index = int((truth > 0).sum((0, 1)).argmax())
        panels = [np.zeros_like(truth), truth, *(np.asarray(found[row]) for found in predictions.values())]
        for axes, title, labels in zip(grid[row], columns, panels, strict=True):
            axes.imshow(_blend(_slice(grey, index), _slice(labels, index)), origin="lower", interpolation="nearest")
            axes.set_xticks([]), axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=10)
        grid[row, 0].set_ylabel(volume.name, fontsize=8)
    patches = [Patch(color=CLASS_COLOURS[i % len(CLASS_COLOURS)], label=name) for i, name in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(classes), frameon=False, fontsize=9)
    write_with(out / "overlays.png", lambda path: figure.savefig(path, dpi=130))
    plt.close(figure)


def draw_contours(
    path: Path, grey: NDArray[Any], labels: NDArray[Any], spacing: Sequence[float], classes: Mapping[int, str],
    title: str,
) -> None:  # fmt: skip
    """Draw the contours of label values on the three slices with most foreground, one along each axis.

    Args:
        path: The PNG to write.
        grey: (X, Y, Z), oriented to RAS.
        labels: (X, Y, Z) on the same grid.
        spacing: Voxel size in mm.
        classes: Names by label value; 0 is not drawn.
        title: Above the picture.
    """
    plt = pyplot()
    from matplotlib.lines import Line2D

    low, high = np.percentile(grey, (1, 99))
    colours = {value: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, value in enumerate(v for v in classes if v)}
    # drawn left to right and bottom to top: (axis that is cut, axis to the right, axis upwards)
    views = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))
    sizes = [(spacing[across] * grey.shape[across], spacing[up] * grey.shape[up]) for _, _, across, up in views]
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 0.9 + 9 * max(h for _, h in sizes) / sum(w for w, _ in sizes)),
        width_ratios=[width for width, _ in sizes], layout="constrained", facecolor="white",
    )  # fmt: skip
    for axis, (name, cut, across, up) in zip(axes, views, strict=True):
        others = tuple(other for other in range(3) if other != cut)
        foreground = (labels > 0).sum(others)
        index = int(foreground.argmax()) if foreground.any() else labels.shape[cut] // 2
        plane, shown = (np.take(volume, index, axis=cut).T for volume in (labels, grey))
        window = {"vmin": low, "vmax": max(high, low + 1e-6)}
        axis.imshow(shown, cmap="gray", origin="lower", aspect=spacing[up] / spacing[across], **window)
        for value, colour in colours.items():
            if (plane == value).any() and min(plane.shape) > 1:
                axis.contour(plane == value, levels=[0.5], colors=[colour], linewidths=1.3)
        if across == 0:
            axis.invert_xaxis()  # the subject's left on the viewer's right
        axis.set(xticks=[], yticks=[], xlabel=f"{name}, slice {index}")
    found = [value for value in colours if (labels == value).any()]
    figure.suptitle(title if found else f"{title}: nothing but background was found", fontsize=10)
    if found:
        lines = [Line2D([], [], color=colours[value], label=classes[value]) for value in found]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5), frameon=False, fontsize=9)
    write_with(path, lambda target: figure.savefig(target, dpi=110))
    plt.close(figure)
