"""Draws the pictures of the README and of docs/architecture.md that show no measurement: `python docs/draw_figures.py`.

A card of its own colour lies behind each, so that they can be read on light and on dark pages.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "figures"
TIMES, PRIME = "\N{ASTERISK OPERATOR}", "\N{PRIME}"
CARD, INK, SOFT = "#fbfbfa", "#1d2733", "#5d6873"
# Okabe and Ito's colours, as in the figures of measurements, and tints of them to write on.
GREY, BLUE, ORANGE, RED, GREEN = "#c9ced4", "#0072b2", "#e69f00", "#d55e00", "#009e73"
TINTS = {GREY: "#eceef0", BLUE: "#d9eaf4", ORANGE: "#fbeccb", RED: "#f9dfcc", GREEN: "#d3ece4"}


def card(width: float, height: float) -> Axes:
    """Axes of width x height inches, one unit an inch, on a card."""
    figure = plt.figure(figsize=(width, height), facecolor=CARD)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def text(
    axes: Axes, x: float, y: float, words: str, size: float = 11, colour: str = INK, bold: bool = False, **options: str
) -> None:
    """Words centred on a point."""
    options = {"ha": "center", "va": "center"} | options
    axes.text(x, y, words, size=size, color=colour, weight="bold" if bold else "normal", **options)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """An arrow from a point to a point."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, lw=1.5, shrinkA=2, shrinkB=2)
    )


def rounded(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A rectangle with rounded corners, filled with the colour's tint."""
    style = "round,pad=0,rounding_size=0.07"
    face = TINTS[colour]
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=colour, lw=1.3))


@dataclass(frozen=True)
class Box:
    """A rounded box with a title and lines beneath it, (x, y) being its lower left corner."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str
    lines: tuple[str, ...] = ()

    def draw(self, axes: Axes) -> Box:
        """Put it on the axes."""
        rounded(axes, self.x, self.y, self.width, self.height, self.colour)
        middle, step = self.x + self.width / 2, 0.2
        top = self.y + self.height / 2 + step * len(self.lines) / 2
        text(axes, middle, top, self.title, 10.5, bold=True)
        for at, line in enumerate(self.lines, 1):
            text(axes, middle, top - 0.015 - step * at, line, 9, SOFT)
        return self

    def at(self, side: str) -> tuple[float, float]:
        """The middle of a side: "left", "right", "top" or "bottom"."""
        x = {"left": self.x, "right": self.x + self.width}.get(side, self.x + self.width / 2)
        y = {"bottom": self.y, "top": self.y + self.height}.get(side, self.y + self.height / 2)
        return x, y


def stack(axes: Axes, x: float, y: float, width: float, height: float, colour: str, sheets: int = 4) -> None:
    """A tensor (S, height, width) as sheets one behind the other, the first at (x, y)."""
    for sheet in reversed(range(sheets)):
        shift = 0.09 * sheet
        face = colour if colour != GREY else TINTS[GREY]
        edge = CARD if colour != GREY else "#98a1aa"
        axes.add_patch(Rectangle((x + shift, y + shift), width, height, facecolor=face, edgecolor=edge, lw=1.1))


def draw_method() -> Axes:
    """W' = W + C * U * R, and what one adapted layer computes."""
    axes = card(10.4, 4.6)
    text(axes, 0.25, 4.3, f"The method: W{PRIME} = W + scale · C {TIMES} U {TIMES} R", 12.5, bold=True, ha="left")
    text(axes, 10.15, 4.3, f"{TIMES} is the t-product of the stacks", 10, SOFT, ha="right")

    stack(axes, 0.4, 2.3, 1.45, 1.3, GREY)
    for left in (0.62, 0.94, 1.5):  # the chosen columns, then the chosen rows, of the first sheet
        axes.add_patch(Rectangle((left, 2.3), 0.11, 1.3, facecolor=BLUE, alpha=0.9, lw=0))
    for bottom in (2.5, 2.86, 3.28):
        axes.add_patch(Rectangle((0.4, bottom), 1.45, 0.11, facecolor=ORANGE, alpha=0.9, lw=0))
    text(axes, 1.27, 2.07, "W: S weights of one shape,", 10)
    text(axes, 1.27, 1.87, "frozen", 10, SOFT)

    text(axes, 2.62, 2.95, "+", 22)
    stack(axes, 3.2, 2.3, 0.42, 1.3, BLUE)
    text(axes, 3.55, 2.07, "C: c columns of W,", 10)
    text(axes, 3.55, 1.87, "frozen", 10, SOFT)
    text(axes, 4.5, 2.95, TIMES, 20)
    stack(axes, 5.15, 2.75, 0.42, 0.42, RED)
    text(axes, 5.5, 2.07, "U: the core,", 10)
    text(axes, 5.5, 1.87, "S·c·r trained parameters", 10, RED, bold=True)
    text(axes, 6.4, 2.95, TIMES, 20)
    stack(axes, 6.95, 2.75, 1.45, 0.42, ORANGE)
    text(axes, 7.8, 2.07, "R: r rows of W,", 10)
    text(axes, 7.8, 1.87, "frozen", 10, SOFT)
    text(axes, 9.55, 3.2, "UNETR, rank 8:", 10)
    text(axes, 9.55, 2.95, "4,608 trained", 11, RED, bold=True)
    text(axes, 9.55, 2.7, "of 92.8 million", 10)

    axes.plot([0.25, 10.15], [1.62, 1.62], color=GREY, lw=1)
    text(axes, 0.25, 1.33, "What layer $l$ computes (training never builds ΔW)", 11, bold=True, ha="left")
    row = Box(2.1, 0.15, 1.55, 0.42, ORANGE, "row  (R, folded)").draw(axes)
    core = Box(4.3, 0.15, 1.75, 0.42, RED, "$B_l$  (from U)").draw(axes)
    col = Box(6.7, 0.15, 1.55, 0.42, BLUE, "col  (C, folded)").draw(axes)
    base = Box(4.3, 0.75, 1.75, 0.42, GREY, "$W_l$").draw(axes)
    text(axes, 0.75, 0.66, "x", 13, bold=True)
    text(axes, 9.75, 0.66, "y", 13, bold=True)
    arrow(axes, (0.87, 0.7), base.at("left"))
    arrow(axes, (0.87, 0.6), row.at("left"))
    arrow(axes, row.at("right"), core.at("left"))
    arrow(axes, core.at("right"), col.at("left"))
    text(axes, 3.97, 0.52, "h", 10, SOFT)
    text(axes, 6.37, 0.52, "m", 10, SOFT)
    text(axes, 9.0, 0.66, "+", 16, bold=True)
    arrow(axes, base.at("right"), (8.88, 0.7))
    arrow(axes, col.at("right"), (8.9, 0.58))
    arrow(axes, (9.12, 0.66), (9.65, 0.66))
    return axes


def draw_floors() -> Axes:
    """The floors of the package: each imports from its own and from those below."""
    title = "Floors: a file imports from its own floor and from those below it"
    axes = card(10.4, 7.7)
    text(axes, 0.25, 7.4, title, 12.5, bold=True, ha="left")
    height, gap, left, right = 0.56, 0.13, 0.25, 7.75
    y = 7.25 - gap

    def floor(colour: str, *rooms: tuple[str, str]) -> float:
        nonlocal y
        y -= height
        width = (right - left - gap * (len(rooms) - 1)) / len(rooms)
        for at, (title, line) in enumerate(rooms):
            Box(left + at * (width + gap), y, width, height, colour, title, (line,)).draw(axes)
        y -= gap
        return y + gap

    floor(GREY, ("cli", "the command tcurlora"))
    floor(GREY, ("bench", "what the adapter costs, measured"))
    floor(GREY, ("segmentation", "the training recipe, with MONAI"), ("integrations", "PEFT"))
    floor(GREY, ("analysis", "what the command counts and draws: plans, file sizes, inspection"))
    top = y
    y -= 1.28
    rounded(axes, left, y, right - left, 1.28, BLUE)
    text(axes, (left + right) / 2, top - 0.17, "adapter", 10.5, bold=True)
    text(axes, (left + right) / 2, top - 0.38, "what a user holds; a room imports from those to its right", 9, SOFT)
    rooms = ("files", "model", "layer", "distributed", "stack | config", "options")
    width = (right - left - 0.2 - 0.1 * 5) / 6
    for at, name in enumerate(rooms):
        x = left + 0.1 + at * (width + 0.1)
        axes.add_patch(Rectangle((x, y + 0.1), width, 0.55, facecolor=CARD, edgecolor=BLUE, lw=0.9))
        text(axes, x + width / 2, y + 0.375, name, 9.5)
    y -= gap
    operator = floor(GREEN, ("operator", "registration, the functional form, backends/: eager, native, triton"))
    floor(GREEN, ("kernels", "Triton"))
    floor(ORANGE, ("maths", "transforms/, selection, folding, scale, the definition (reference)"))
    bottom = floor(GREY, ("io", "files, tables"), ("trace", "names of stages for profilers"))
    Box(
        8.05, bottom, 2.1, operator + height - bottom, GREEN, "csrc (C++)",
        ("schemas, autograd,", "the choice of a backend;", "the native backend:", "cpu/, cuda/", "", "registers",
         "torch.ops.tcurlora", "for the operator floor"),
    ).draw(axes)  # fmt: skip
    text(axes, 9.1, 6.7, "imports", 10, SOFT)
    arrow(axes, (9.1, 6.55), (9.1, 3.45), SOFT)
    return axes


def draw_path() -> Axes:
    """The path of one x from an adapted layer to a kernel, and the gradient's way back."""
    axes = card(10.4, 6.0)
    text(axes, 0.25, 5.7, "The path of one x, and of its gradient back", 12.5, bold=True, ha="left")
    wide, tall = 3.0, 0.78
    first = [0.25, 3.7, 7.15]
    layer = Box(first[0], 4.55, wide, tall, BLUE, "TCURLinear.forward(x)", ("adapter/layer/linear.py",)).draw(axes)
    stacked = Box(first[1], 4.55, wide, tall, BLUE, "TCURStack.adapt", ("adapter/stack/stack.py",)).draw(axes)
    calls = Box(
        first[2], 4.55, wide, tall, ORANGE, "transform.calls → Factors",
        ("maths/transforms/: col, core, row,", "slices and scale of each call"),
    ).draw(axes)  # fmt: skip
    chosen = Box(
        first[0], 3.25, wide, tall, GREEN, "tcurlora::forward",
        ("csrc/operator.cpp chooses a backend", "by operator/backends/choice.py"),
    ).draw(axes)  # fmt: skip
    autograd = Box(
        first[1], 3.25, wide, tall, GREEN, "torch.ops.tcurlora.linear",
        ("autocast and autograd:", "csrc/autograd.cpp"),
    ).draw(axes)  # fmt: skip
    functional = Box(
        first[2], 3.25, wide, tall, GREEN, "functional.tcur_linear", ("operator/functional.py",)
    ).draw(axes)  # fmt: skip
    native = Box(
        first[0], 1.75, wide, 0.98, GREEN, "native",
        ("csrc/native.cpp: wide products by PyTorch,", "from h to m by csrc/cpu/ or csrc/cuda/"),
    ).draw(axes)  # fmt: skip
    eager = Box(
        first[1], 1.75, wide, 0.98, GREEN, "eager",
        ("operator/backends/eager.py:", "PyTorch operations, from h to m", "those of maths/middle.py"),
    ).draw(axes)  # fmt: skip
    triton = Box(
        first[2], 1.75, wide, 0.98, GREEN, "triton",
        ("operator/backends/triton.py, then", "kernels/operator.py and kernels/launch.py"),
    ).draw(axes)  # fmt: skip
    arrow(axes, layer.at("right"), stacked.at("left"))
    arrow(axes, stacked.at("right"), calls.at("left"))
    arrow(axes, calls.at("bottom"), functional.at("top"))
    arrow(axes, functional.at("left"), autograd.at("right"))
    arrow(axes, autograd.at("left"), chosen.at("right"))
    bus = 2.98
    axes.plot([1.75, 8.65], [bus, bus], color=INK, lw=1.5)
    axes.plot([1.75, 1.75], [3.25, bus], color=INK, lw=1.5)
    for box in (native, eager, triton):
        arrow(axes, (box.at("top")[0], bus + 0.02), box.at("top"))
    text(axes, 5.2, 1.5, "forward returns y and h; the smaller of h and x is kept for the core's gradient", 10, SOFT)
    steps = ("g, the gradient of y", "Forward::backward", "tcurlora::backward", "dx, dcore")
    about = (
        "from PyTorch's autograd",
        "csrc/autograd.cpp",
        "chooses a backend again",
        "without a tensor as large as W",
    )
    width, boxes = 2.25, []
    for at, (title, line) in enumerate(zip(steps, about, strict=True)):
        x = 0.25 + at * (width + 0.3)
        boxes.append(Box(x, 0.35, width, 0.7, RED, title, (line,)).draw(axes))
    for before, after in pairwise(boxes):
        arrow(axes, before.at("right"), after.at("left"), RED)
    return axes


def main(folder: Path) -> None:
    """Write all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("method", draw_method), ("floors", draw_floors), ("path", draw_path)):
        draw()
        figure = plt.gcf()
        figure.set_dpi(160)
        figure.canvas.draw()
        # 64 colours are enough for flat areas and the edges of letters, and a third of the bytes.
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64)
        picture.save(folder / f"{name}.png", optimize=True)
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
