"""Tests that need a GPU: streams, graphs, no synchronisation, large tensors. They are skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tcurlora_ext.maths.contract import Riding
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


def riding(x: torch.Tensor, weight: torch.Tensor, adapter: Riding, backend: str) -> tuple[torch.Tensor, ...]:
    y = torch.ops.tcurlora.riding(x, weight, None, *adapter, backend)
    return (y, *torch.autograd.grad(y, (x, adapter.core), torch.ones_like(y)))


@pytest.fixture
def riding_case(backend: str) -> tuple[Any, ...]:
    """The riding form of a layer as above, without a bias; tests/operator/test_riding.py runs on a GPU too."""
    half = torch.float16
    adapter = Riding(
        torch.randperm(192)[:8], torch.randn(6, 8, 8).requires_grad_(), torch.randn(48, 192).to(half) / 14,
        torch.rand(8) + 0.5, 1, 0.1,
    )  # fmt: skip
    case = torch.randn(130, 192, dtype=half).requires_grad_(), torch.randn(256, 192, dtype=half), adapter, backend
    riding(*case)
    return case


def test_a_step_of_the_riding_form_is_captured_and_waits_for_nothing(riding_case: tuple[Any, ...]) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        riding(*riding_case)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = riding(*riding_case)
    x, _, adapter, _ = riding_case
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        adapter.core.copy_(torch.randn_like(adapter.core))
    graph.replay()
    for found, right in zip(captured, riding(*riding_case), strict=True):
        assert_close(found, right, rtol=0, atol=0)


def test_the_riding_form_is_queued_on_the_current_stream(riding_case: tuple[Any, ...]) -> None:
    expected = riding(*riding_case)
    x, *rest = riding_case
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x).requires_grad_()
        torch.cuda._sleep(50_000_000)  # about 30 ms: work on another stream would read the zeros
        with torch.no_grad():
            late.copy_(x)
        found = riding(late, *rest)
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_offsets_of_the_riding_form_beyond_32_bits(backend: str) -> None:
    """x of more than 2^31 elements: the last rows equal those of a short call."""
    tokens, last, features = 600_000, 100, 4096
    if torch.cuda.mem_get_info()[0] < 25e9:
        pytest.skip("needs 25 GB of free memory")
    adapter = Riding(torch.arange(0, 4096, 512), torch.randn(1, 8, 4), torch.randn(4, 4096) / 64, torch.ones(8), 0, 1.0)
    adapter = adapter._replace(row=adapter.row.half())
    x = torch.zeros(tokens, features, dtype=torch.float16)
    x[-last:] = torch.randn(last, features)
    with torch.no_grad():
        changed = torch.ops.tcurlora.ride(x, *adapter, backend)
        short = torch.ops.tcurlora.ride(x[-last:], *adapter, backend)
    assert_close(changed[-last:], short, rtol=1e-2, atol=1e-2)


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
