"""The table of a run on the terminal."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console

from tcurlora_ext.segmentation.report.page import summarise_runs, table


def result(method: str, seed: int, **others: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "trained_numbers": 123_456_789, "lr": 0.01, "steps": 120,
        "dice": 0.7 + seed / 10, "dice a": 0.7, "hd95_mm": 12.5, "hd95_mm a": 12.5, "hd95_undefined": 1234,
        "seconds": 12_345.0, "warm_up_steps": 120, "adapter_bytes": 493_827_156, **others,
    }  # fmt: skip


def shown(results: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(table(summarise_runs(results)))
    return capture.get()


def test_it_fits_80_columns_with_long_names_and_large_numbers() -> None:
    name = "tcur-learned:rows_only=true:change=adapter:rank=16"
    cost = {"step_ms": 12_345.6, "step_mib": 65_432.1, "gpu_peak_mib": None}
    text = shown([result(name, 0, **cost), result(name, 1, **cost), result("lora", 0, **cost)])
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in ("tcur-learned", "75.0 ± 7.1", "12,346", "65,432.1", "493,827.2"):
        assert part in text


def test_distances_that_a_mean_leaves_out_are_counted_below() -> None:
    text = shown([result("lora", 0), result("lora", 1), result("head", 0, hd95_undefined=0)])
    assert (text.count("12.50*"), text.count("12.50 ")) == (1, 1)
    assert "* the mean leaves out labels of which nothing was predicted: lora 2,468" in " ".join(text.split())
    assert "undefined" not in text


def test_steps_that_a_method_takes_before_the_others_are_said_below() -> None:
    text = shown([result("lora", 0, warm_up_steps=0), result("tcur-learned", 0)])
    assert text.splitlines()[-1].strip() == "tcur-learned: 120 steps after a warm-up of 120 steps"
    assert "warm-up" not in shown([result("lora", 0, warm_up_steps=0)])


def test_what_an_earlier_version_has_not_measured_is_a_dash() -> None:
    (row,) = summarise_runs([result("lora", 0, step_ms=None, step_mib=None, gpu_peak_mib=None)])
    assert (row["step_ms"], row["step_mib"]) == ("", "")
    line = next(line for line in shown([result("lora", 0)]).splitlines() if "lora" in line)
    assert line.split()[-2:] == ["-", "-"]
    (gpu,) = summarise_runs([result("lora", 0, step_ms=1.5, step_mib=2.0, gpu_peak_mib=99.0)])
    assert (gpu["step_ms"], gpu["gpu_peak_mib"]) == (1.5, 99.0)
    assert math.isclose(gpu["step_mib"], 2.0)
