"""Tests that need a GPU: streams, graphs, no synchronisation, large tensors. They are skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tcurlora_ext.operator.functional import tcur_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
# As wide as layers are, and aligned, so that the Triton kernels take tensor descriptors.
SHAPE = {"S": 6, "out": 256, "in_": 192, "c": 8, "r": 8, "n": 3, "leading": (130,), "scale": 0.05}


def training(case: Any) -> tuple[torch.Tensor, ...]:
    y = tcur_linear(
        *case.tensors, case.first_slice, case.num_slices, case.scale, transform=case.transform, backend=case.backend
    )
    return (y, *torch.autograd.grad(y, (case.x, case.core), torch.ones_like(y)))


@pytest.fixture
def case(make_case: Callable[..., Any]) -> Any:
    case = make_case(**SHAPE).to(torch.float16).training("x", "core")
    training(case)  # kernels compiled, constants on the device
    return case


def test_a_step_is_captured_in_a_graph_and_replayed_on_new_data(case: Any) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training(case)
    with torch.no_grad():
        case.x.copy_(torch.randn_like(case.x))
        case.core.copy_(torch.randn_like(case.core))
    graph.replay()
    for found, right in zip(captured, training(case), strict=True):
        assert_close(found, right, rtol=0, atol=0)


def test_nothing_waits_for_the_device(case: Any) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training(case)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_work_is_queued_on_the_current_stream(case: Any) -> None:
    expected = training(case)
    x = case.x.detach().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x).requires_grad_()
        torch.cuda._sleep(50_000_000)  # about 30 ms: work on another stream would read the zeros
        with torch.no_grad():
            late.copy_(x)
        found = training(case.replaced(x=late))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_tensors_of_another_than_the_current_device(case: Any) -> None:
    names = ("x", "weight", "bias", "col", "core", "row")
    other = case.replaced(**{n: getattr(case, n).detach().to("cuda:1") for n in names}).training("x", "core")
    with torch.cuda.device(0):
        for found, right in zip(training(other), training(case), strict=True):
            assert_close(found.cpu(), right.cpu(), rtol=0, atol=0)


def test_nothing_of_the_size_of_a_weight_is_allocated(make_case: Callable[..., Any]) -> None:
    """64 tokens of a 2,048 x 2,048 layer: outputs and intermediate tensors are a tenth of the weight's size."""
    case = make_case(S=4, out=2048, in_=2048, c=4, r=4, leading=(64,)).to(torch.float16).training("x", "core")
    training(case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training(case)
    assert torch.cuda.max_memory_allocated() - before < 2 * 2048 * 2048 / 2


def test_offsets_beyond_32_bits(make_case: Callable[..., Any]) -> None:
    """m (T, n, c*S) of more than 2^31 elements: 90 million tokens of 24. The last rows equal those of a short call."""
    tokens, last = 90_000_000, 100
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free memory")
    case = make_case(S=8, out=8, in_=8, c=1, r=1, n=3, leading=(last,)).to(torch.float16)
    x = torch.zeros(tokens, 8, dtype=torch.float16, device=case.x.device)
    x[-last:] = case.x
    with torch.no_grad():
        y = tcur_linear(x, *case.tensors[1:], 0, 3, case.scale, backend=case.backend)
        short = tcur_linear(*case.tensors, 0, 3, case.scale, backend=case.backend)
    assert_close(y[-last:], short, rtol=1e-2, atol=1e-2)
