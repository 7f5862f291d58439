"""Pictures of scans: contours of label maps on slices, with the sides of the body and a scale bar.

Volumes are oriented to RAS. Slices are drawn as radiologists see them: the subject's left on the viewer's right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.segmentation.dataset import Volume
from tcurlora_ext.segmentation.metrics.evaluation import dice_scores, finite_mean, one_hot_pair
from tcurlora_ext.segmentation.report.figures import pyplot

# Okabe and Ito's colours, which colour-blind readers can tell apart.
CLASS_COLOURS = ("#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#f0e442", "#0072b2", "#d55e00")
Array = NDArray[Any]


@dataclass(frozen=True)
class View:
    """A direction in which a volume is cut.

    Attributes:
        name: Of the plane.
        cut, across, up: The axis that is cut, the one drawn from left to right, and the one drawn upwards.
        sides: What is at the left, right, lower and upper edge: R(ight), L(eft), P(osterior), A(nterior), I(nferior),
            S(uperior) of the subject.
    """

    name: str
    cut: int
    across: int
    up: int
    sides: str

    def plane(self, volume: Array, index: int) -> Array:
        """A slice, (up, across)."""
        return np.asarray(np.take(volume, index, axis=self.cut).T)

    def fullest(self, labels: Array) -> int:
        """The slice with most foreground; the middle one where there is none."""
        foreground = (labels > 0).sum(tuple(axis for axis in range(3) if axis != self.cut))
        return int(foreground.argmax()) if foreground.any() else labels.shape[self.cut] // 2


AXIAL, CORONAL, SAGITTAL = (
    View("axial", 2, 0, 1, "RLPA"),
    View("coronal", 1, 0, 2, "RLIS"),
    View("sagittal", 0, 1, 2, "PAIS"),
)


def class_colours(values: Sequence[int]) -> dict[int, str]:
    """A colour for each foreground label value."""
    return {value: CLASS_COLOURS[i % len(CLASS_COLOURS)] for i, value in enumerate(v for v in values if v)}


def draw_slice(
    axes: Any, view: View, index: int, grey: Array, labels: Array, spacing: Sequence[float], colours: Mapping[int, str]
) -> None:
    """Draw a slice of a scan in grey with the contours of its labels.

    Args:
        axes: Matplotlib's.
        view: The direction of the cut.
        index: Of the slice.
        grey: (X, Y, Z), oriented to RAS.
        labels: (X, Y, Z) on the same grid.
        spacing: Voxel size in mm.
        colours: By label value; others are not drawn.
    """
    low, high = np.percentile(grey, (1, 99))
    axes.imshow(
        view.plane(grey, index), cmap="gray", origin="lower", aspect=spacing[view.up] / spacing[view.across], vmin=low,
        vmax=max(high, low + 1e-6), interpolation="nearest",
    )  # fmt: skip
    shown = view.plane(labels, index)
    for value, colour in colours.items():
        if (shown == value).any() and min(shown.shape) > 1:
            axes.contour(shown == value, levels=[0.5], colors=[colour], linewidths=1.3)
    if view.across == 0:
        axes.invert_xaxis()
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def mark(axes: Any, view: View, width: float) -> None:
    """Write the sides of the body at the edges, and draw a bar of about a quarter of the width.

    Args:
        axes: Matplotlib's, with a slice.
        view: Its direction.
        width: Of the slice in mm.
    """
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=1.8, foreground="black")]  # legible on white matter too
    style = {
        "transform": axes.transAxes, "color": "white", "fontsize": 7, "ha": "center", "va": "center",
        "path_effects": outline,
    }  # fmt: skip
    for side, place in zip(view.sides, ((0.04, 0.5), (0.96, 0.5), (0.5, 0.04), (0.5, 0.96)), strict=True):
        axes.text(*place, side, **style)
    scale = 10 ** math.floor(math.log10(width / 4))
    bar = max(factor * scale for factor in (1, 2, 5) if factor * scale <= width / 4)
    axes.plot(
        [0.05, 0.05 + bar / width], [0.1, 0.1], transform=axes.transAxes, color="white", lw=1.6, path_effects=outline
    )
    axes.text(0.05 + bar / width / 2, 0.15, f"{bar:g} mm", **style)


def _grey(volume: Volume) -> Array:
    """The first channel on the truth's grid."""
    from monai.transforms.spatial.array import ResampleToMatch

    image: Any = volume.image[:1]
    if image.shape[1:] != volume.truth.shape[1:]:
        image = ResampleToMatch(mode="bilinear", padding_mode="border")(image, volume.truth)
    return np.asarray(image)[0]


def _case_dice(prediction: Tensor, volume: Volume, classes: int) -> str:
    found = finite_mean(dice_scores(one_hot_pair(prediction, volume.truth, classes + 1)))
    return "" if math.isnan(found) else f"Dice {100 * found:.1f} %"


def draw_overlays(out: Path, volumes: Sequence[Volume], predictions: Mapping[str, Sequence[Tensor]],
                  classes: Sequence[str]) -> None:  # fmt: skip
    """Draw overlays.png: a row for each case, with the contours of truth and predictions and the Dice of each.

    The slice is the axial one with most foreground; the Dice is that of the whole case, the mean over its classes.

    Args:
        out: The run folder.
        volumes: The cases.
        predictions: Label values of the first of them, by the name of what predicted them.
        classes: Names of the foreground classes, of label values 1, 2, ...
    """
    plt = pyplot()
    from matplotlib.patches import Patch

    rows, view = len(next(iter(predictions.values()))), AXIAL
    columns, colours = ["image", "truth", *predictions], class_colours(range(len(classes) + 1))
    figure, grid = plt.subplots(
        rows, len(columns), figsize=(1.75 * len(columns), 2.1 * rows + 0.5), squeeze=False, layout="constrained"
    )  # fmt: skip
    for row, volume in enumerate(volumes[:rows]):
        truth, grey = np.maximum(np.asarray(volume.truth)[0].astype(int), 0), _grey(volume)  # below 0: ignored
        index = view.fullest(truth)
        panels = [np.zeros_like(truth), truth, *(np.asarray(found[row]) for found in predictions.values())]
        scores = ["", "", *(_case_dice(found[row], volume, len(classes)) for found in predictions.values())]
        for axes, title, labels, score in zip(grid[row], columns, panels, scores, strict=True):
            draw_slice(axes, view, index, grey, labels, volume.spacing, colours)
            axes.set_xlabel(score, fontsize=8)
            if row == 0:
                axes.set_title(title, fontsize=10)
        mark(grid[row, 0], view, volume.spacing[view.across] * truth.shape[view.across])
        grid[row, 0].set_ylabel(volume.name, fontsize=8)
    patches = [Patch(color=colours[value], label=name) for value, name in enumerate(classes, start=1)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(classes), frameon=False, fontsize=9)
    write_with(out / "overlays.png", lambda path: figure.savefig(path, dpi=130))
    plt.close(figure)


def draw_contours(
    path: Path, grey: Array, labels: Array, spacing: Sequence[float], classes: Mapping[int, str], title: str
) -> None:
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

    colours, views = class_colours(list(classes)), (AXIAL, CORONAL, SAGITTAL)
    sizes = [[spacing[axis] * grey.shape[axis] for axis in (view.across, view.up)] for view in views]
    figure, axes = plt.subplots(
        1, 3, figsize=(9, 0.9 + 9 * max(h for _, h in sizes) / sum(w for w, _ in sizes)),
        width_ratios=[width for width, _ in sizes], layout="constrained", facecolor="white",
    )  # fmt: skip
    for axis, view, (width, _) in zip(axes, views, sizes, strict=True):
        index = view.fullest(labels)
        draw_slice(axis, view, index, grey, labels, spacing, colours)
        mark(axis, view, width)
        axis.set_xlabel(f"{view.name}, slice {index}")
    found = [value for value in colours if (labels == value).any()]
    figure.suptitle(title if found else f"{title}: nothing but background was found", fontsize=10)
    if found:
        lines = [Line2D([], [], color=colours[value], label=classes[value]) for value in found]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 5), frameon=False, fontsize=9)
    write_with(path, lambda target: figure.savefig(target, dpi=110))
    plt.close(figure)
