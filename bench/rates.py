"""The learning rate of each method of a comparison, searched on cases that its table does not have.

Every method has the same number of trials, at multiples of its default rate. What trains beside each adapter, the head
or the decoder, is searched before the adapters unless the setting has its rate, and then has that rate beside them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tcurlora_ext.bench.learned import Setting, run_methods, settings_of
from tcurlora_ext.io.records import read_csv
from tcurlora_ext.segmentation.methods import get_methods
from tcurlora_ext.segmentation.terminal import Display

FACTORS = (1 / 3, 1.0, 3.0)


def search_rates(
    setting: Setting, methods: Sequence[str], folder: Path, steps: int, display: Display,
    factors: Sequence[float] = FACTORS,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train each method at each of its rates, with seed 0, and validate it, on the setting's cases to choose on.

    Args:
        setting: The network and its cases; a rate in its `lr` is kept and not searched.
        methods: Their names with options.
        folder: Gets a run folder for each factor and method; runs that are there are not run again.
        steps: Of every run.
        display: Says what runs.
        factors: The trials, as multiples of a method's default rate.

    Returns:
        A row for each trial: `method`, `lr`, `dice` (mean over cases, from 0 to 1), and `chosen`, whether it is the
        method's best; the lowest of equally good rates.
    """
    rows: list[dict[str, Any]] = []
    settings, rates = settings_of(setting, setting.choice, methods, 1, steps), dict(setting.lr)
    named = zip(get_methods(methods), methods, strict=True)
    for method, name in sorted(named, key=lambda pair: pair[0].adapter):
        if method.name in rates:
            continue
        trials: list[dict[str, Any]] = []
        for factor in factors:
            rate = float(f"{method.lr * factor:.3g}")
            run = folder / f"{factor:.3g}" / method.folder
            if not (run / "report.html").is_file():  # the last file of a run
                rated = replace(settings, methods=(name,), lr={**rates, method.name: rate})
                run_methods(rated, run, display)
            (result,) = read_csv(run / "metrics.csv")
            trials.append({"method": method.name, "lr": rate, "dice": float(result["dice"])})
        best = max(trials, key=lambda trial: float(trial["dice"]))
        rows += [{**trial, "chosen": int(trial is best)} for trial in trials]
        if not method.adapter:
            rates[method.name] = best["lr"]
    return rows


def chosen_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The rate of each method that :func:`search_rates` has chosen."""
    return {row["method"]: row["lr"] for row in rows if row["chosen"]}
