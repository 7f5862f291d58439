"""A picture of a profile: what each stage took, and the least it can take by count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcurlora_ext.io.atomic import write_with
from tcurlora_ext.segmentation.report.figures import pyplot

from ..reading.styles import BLUE, ORANGE, SKY
from ..run import Row
from .measured import TOTAL

MEASURED, SECOND, LEAST = BLUE, SKY, ORANGE


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: bytes read and written with the fewest possible; time with the least where bytes are unknown."""
    plt = pyplot()
    shown = [row for row in rows if row["stage"] != TOTAL]
    total = rows[-1]
    has_bytes = any(row["read_mib"] for row in shown)
    series = (
        [("read_mib", "read", MEASURED), ("written_mib", "written", SECOND)]
        if has_bytes
        else [("time_ms", "measured", MEASURED)]
    )
    least, unit = ("fewest_mib", "MiB") if has_bytes else ("least_ms", "ms")
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.55 * len(shown)), layout="constrained")
    places = range(len(shown))
    starts = [0.0] * len(shown)
    for column, label, colour in series:
        widths = [float(row[column] or 0) for row in shown]
        bars = axes.barh([y - 0.2 for y in places], widths, 0.38, left=starts, color=colour, label=label)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.bar_label(bars, [f"{end:.3g}" for end in starts], padding=3, fontsize=8)
    lowest = [row[least] for row in shown]
    bars = axes.barh([y + 0.2 for y in places], [float(x or 0) for x in lowest], 0.38, color=LEAST, hatch="///",
                     edgecolor="white", label="least, by count")  # fmt: skip
    axes.bar_label(bars, [f"{float(x):.3g}" if x else "" for x in lowest], padding=3, fontsize=8)
    axes.set_yticks(places, [_label(row) for row in shown], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    what = "device memory" if has_bytes else "time"
    axes.set_xlabel(f"{what} of one step, {unit}, by {total['tool']}")
    axes.set_title(
        f"{total['case']}, {total['variant']}: {total['tokens']} tokens, r = {total['rank']}, {total['dtype']}, "
        f"{total['mode']}\n{total['device']}, {total['time_ms']} ms in all",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    write_with(path, lambda temporary: figure.savefig(temporary, dpi=130))
    plt.close(figure)


def _label(row: dict[str, Any]) -> str:
    """A stage with the number of its calls; a merged stage has one line per part."""
    calls = f", {row['calls']} calls" if row["calls"] not in ("", 1) else ""
    return str(row["stage"]).replace(", ", "\n") + calls
