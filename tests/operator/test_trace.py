"""The stages of the operator in a profile, with the names of the maths."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

STAGES = (
    "h = x row^T",
    "m = h B^T",
    "x W^T",
    "m col^T",
    "p = g col",
    "dh = p B",
    "dcore = diag(p^T h)",
    "dx = g W + dh row",
)


def test_every_stage_is_a_range_of_the_profiler(make_case: Callable[..., Any]) -> None:
    case = make_case(S=6, n=2).to(torch.float32).training("x", "core")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.tcurlora.linear(*case.arguments).sum().backward()
    ranges = [event.key for event in profile.key_averages() if "=" in event.key]
    for stage in STAGES:
        assert any(stage in name for name in ranges), (stage, ranges)


def test_without_nvtx_there_are_no_ranges_and_no_error() -> None:
    code = (
        "import sys; sys.modules['nvtx'] = None\n"
        "import torch, tcurlora_ext as tcur\n"
        "tcur.TCURLinear(8, 8, rank=2, backend='eager')(torch.randn(3, 8)).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
