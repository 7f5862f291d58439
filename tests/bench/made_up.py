"""Result files for tests: every column, and numbers whose results can be computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tcurlora_ext.bench.names import DENSE, FROZEN, TRANSIENT
from tcurlora_ext.bench.rows import NEEDED, PROVENANCE
from tcurlora_ext.io.records import write_csv

SHAPE = {"in": "768", "out": "768", "slices": "1", "stack": "48", "q": "384"}


def row(variant: str, milliseconds: float, spread: float = 0.01, frozen: float = 10.0, **rest: Any) -> dict[str, str]:
    """A row of UNETR's out_proj; the percentiles of its time differ from the median by ``spread`` of it."""
    ratio = milliseconds / frozen
    found = dict.fromkeys(NEEDED, "1") | {name: name for name in PROVENANCE} | SHAPE
    found |= {
        "case": "unetr out_proj", "network": "layer", "sweep": "", "mode": "training", "dtype": "float32",
        "tokens": "2048", "rank": "8", "variant": variant, "rounds": "20",
    }  # fmt: skip
    own = spread if variant != FROZEN else 0.0
    for name, middle, width in (("{}_ms", milliseconds, spread), ("over_frozen{}", ratio, own)):
        for place, by in (("p20", 1 - width), ("median", 1.0), ("p80", 1 + width)):
            column = name.format(place) if name == "{}_ms" else name.format("" if place == "median" else f"_{place}")
            found[column] = f"{middle * by:.4g}"
    return found | {name: str(value) for name, value in rest.items()}


def sweep() -> list[dict[str, str]]:
    """Times of t/100, t/50 and 4 + t/100 ms: building dW takes 4 ms and is cheaper above 400 tokens."""
    rows = []
    for mode in ("training", "inference"):
        for t in (100, 300, 500, 1600):
            times = {"frozen": t / 100, "tcur native": t / 50, "tcur eager": t / 10, DENSE: 4 + t / 100}
            if mode == "training":
                times[TRANSIENT] = 100.0
            counts = {"frozen": t, "tcur native": 2 * t, "tcur eager": 2 * t, DENSE: 300 + t, TRANSIENT: 300 + 3 * t}
            rows += [
                row(name, time, frozen=t / 100, sweep="tokens", tokens=t, mode=mode, gflop=counts[name])
                for name, time in times.items()
            ]
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """The rows as a result file."""
    write_csv(path, rows)
    return path
