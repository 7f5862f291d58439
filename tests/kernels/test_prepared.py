"""What later runs of a launch hand to the compiled kernel, seen by a driver that launches nothing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this driver would take the place of the GPU's"),
]


def plain(argument: Any, known: dict[int, str]) -> Any:
    """An argument of a launch for comparison: a tensor by its name among the known ones, a descriptor by its fields."""
    if isinstance(argument, Tensor):
        return known.get(argument.data_ptr(), "new"), argument.shape, argument.stride(), argument.dtype
    if hasattr(argument, "block_shape"):
        return {name: plain(value, known) for name, value in vars(argument).items()}
    return argument


@pytest.mark.parametrize("which", [0, 1], ids=["separate", "one-launch"])
def test_later_runs_hand_over_what_a_first_run_does_with_the_tensors_of_their_own_call(which: int) -> None:
    from tcurlora_ext.bench import launch_path
    from tcurlora_ext.kernels import operator, plans

    def arguments(call: Any) -> list[Any]:
        x, weight, bias, factors = call
        operator.forward(*call)
        tensors = {"x": x, "weight": weight, "bias": bias, "col": factors.col, "core": factors.core, "row": factors.row}
        known = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        return [plain(one, known) for one in driver.launched[9:]]  # after grid, stream, function, metadata and hooks

    with launch_path.without_gpu() as driver:
        another, call = (launch_path.operands(launch_path.LAYERS[which]) for _ in range(2))
        call = (*call[:3], call[3]._replace(first_slice=1, scale=0.25))
        arguments(another)
        later = arguments(call)
        plans.forget_plans()
        first = arguments(call)
    assert first == later
    names = {one["base"][0] if isinstance(one, dict) else one[0] for one in later if isinstance(one, dict | tuple)}
    assert {"x", "weight", "col", "bias", "new"} <= names
    if which == 1:
        assert {"row", "core"} <= names
        assert {1, 0.25} <= {one for one in later if isinstance(one, int | float)}


@pytest.mark.parametrize("needs", [None, (True, False, True), (True, True, False)], ids=str)
def test_later_runs_of_the_riding_form_too(needs: tuple[bool, bool, bool] | None) -> None:
    """The last launch of a forward pass, of a backward pass, and of one with the core's gradient."""
    from tcurlora_ext.bench import launch_path
    from tcurlora_ext.kernels import plans
    from tcurlora_ext.kernels.riding import operator
    from tcurlora_ext.maths.contract import Riding

    def tensors() -> tuple[Any, ...]:
        x, h, row = (torch.randn(size).bfloat16() for size in ((256, 64), (256, 8), (16, 64)))
        return x, h, Riding(torch.randperm(64)[:8], torch.randn(2, 8, 8), row, torch.rand(8), 0, 1.0)

    def arguments(x: Tensor, h: Tensor, adapter: Riding) -> list[Any]:
        if needs is None:
            operator.ride(x, adapter)
        else:
            operator.ride_back(x, x, h, adapter, needs)
        known = {t.data_ptr(): name for name, t in (*adapter._asdict().items(), ("x", x), ("h", h)) if name in NAMES}
        return [plain(one, known) for one in driver.launched[9:]]

    NAMES = {"x", "h", "columns", "core", "row", "gain"}
    with launch_path.without_gpu() as driver:
        (x, h, adapter), another = tensors(), tensors()
        adapter = adapter._replace(slice_index=1, scale=0.25)
        arguments(*another)
        later = arguments(x, h, adapter)
        plans.forget_plans()
        assert arguments(x, h, adapter) == later
    names = {one[0] for one in later if isinstance(one, tuple)}
    assert names >= ({"gain", "new"} if needs and needs[1] else {"x", "columns", "core", "row", "gain", "new"})
    assert {1, 0.25} <= {one for one in later if isinstance(one, int | float)}


def test_the_benchmark_of_the_launches_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    from tcurlora_ext.bench import launch_path

    rows = launch_path.launch_times(calls=1, rounds=1)
    assert [(row["layer"], row["pass"], row["launches"]) for row in rows] == [
        ("unetr qkv", "forward", 2), ("unetr qkv", "backward", 4),
        ("one launch", "forward", 1), ("one launch", "backward", 3),
    ]  # fmt: skip
    assert all(float(row["least_us"]) > 0 for row in rows)
