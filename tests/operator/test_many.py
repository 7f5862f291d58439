"""The operators of a batch of many adapters in C++, against the same in PyTorch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator import flops
from tcurlora_ext.operator.backends.native import extension
from tcurlora_ext.operator.bank import TokenPlan, riding

pytestmark = pytest.mark.skipif(extension() is None, reason="without the C++ extension")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Errors as multiples of the largest value: a few roundings of each dtype.
CLOSE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Call(NamedTuple):
    """A layer of 24 to 10 features, and 700 tokens of four adapters and the base; the fifth adapter has no token."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    adapter: Riding
    cores: Tensor  # (5, 2, c, r)
    plan: TokenPlan


def make(dtype: torch.dtype, c: int = 5, r: int = 11) -> Call:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    wide = torch.promote_types(dtype, torch.float32)
    columns = torch.randperm(24, generator=generator)[:c]
    # Cores that lie between others, as in the bank's memory.
    cores = 0.3 * random(5, 3, 2, c, r, of=wide)[:, 1]
    adapter = Riding(columns, cores[0], random(2 * r, 24), random(c, of=wide), 1, 0.7)
    # One adapter has most tokens, more than are summed as one piece.
    owners = torch.tensor([0, 2, -1, 1, 2, 3, 2])[torch.randint(7, (700,), generator=generator)]
    owners[200:] = 2
    return Call(
        random(700, 24), random(10, 24), random(10), adapter, cores, TokenPlan(owners, 1, 5, torch.device("cpu"))
    )


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the bank compute by PyTorch operations from then on."""

    def use() -> None:
        # The package has the function riding by the name of its module.
        monkeypatch.setitem(riding.__globals__, "has_kernels", lambda *_: False)

    return use


def results(call: Call, needs_x: bool = True) -> list[Tensor]:
    """The layer's result and the gradients of x, bias and cores, and the result in inference."""
    x, bias = call.x.clone().requires_grad_(needs_x), call.bias.clone().requires_grad_()
    cores = call.cores.detach().requires_grad_()
    y = riding(x, call.weight, bias, call.adapter, cores, call.plan)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    with torch.no_grad():
        alone = riding(x, call.weight, bias, call.adapter, cores, call.plan)
    gradients = [tensor.grad for tensor in (bias, cores, x) if tensor.grad is not None]
    assert len(gradients) == 2 + needs_x
    return [y.detach(), alone, *gradients]


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 11), (8, 8), (1, 3)], ids=str)
def test_kernels_equal_operations(
    dtype: torch.dtype, sizes: tuple[int, int], needs_x: bool, without_kernels: Callable[[], None]
) -> None:
    call = make(dtype, *sizes)
    found = results(call, needs_x)
    without_kernels()
    for ours, expected in zip(found, results(call, needs_x), strict=True):
        assert ours.dtype == expected.dtype
        error = (ours.double() - expected.double()).abs().max()
        assert error <= 30 * CLOSE[dtype] * expected.double().abs().max()
    assert found[3][2, 1].any()
    assert not found[3][4].any()  # an adapter without tokens has a gradient of zeros
    assert not found[3][:, 0].any()  # and so has a slice of another layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_base_are_copied(dtype: torch.dtype) -> None:
    call = make(dtype)
    base = call.plan.owners < 0
    assert base.any()
    expected = torch.nn.functional.linear(call.x, call.weight, call.bias)
    for found in results(call)[:2]:
        assert torch.equal(found[base], expected[base])
        assert (found[~base] != expected[~base]).any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    call, threads = make(torch.float32), torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            _, h = torch.ops.tcurlora.ride_many(*forward_arguments(call))
            found.append(torch.ops.tcurlora.ride_many_backward(*backward_arguments(call, h)))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def forward_arguments(call: Call) -> tuple[Any, ...]:
    adapter = call.adapter
    cores = call.cores[:, adapter.slice_index]
    return call.x, adapter.own_row, cores, adapter.columns, adapter.gain, adapter.scale, call.plan.owners


def backward_arguments(call: Call, h: Tensor | None, needs_h: bool = True) -> tuple[Any, ...]:
    _, _, *adapters, _ = forward_arguments(call)
    return torch.sin(call.x), h, *adapters, *call.plan.by_adapter, needs_h


def layer_arguments(call: Call) -> tuple[Any, ...]:
    columns, _, row, gain, at, scale = call.adapter
    return call.x, call.weight, call.bias, columns, call.cores, row, gain, at, scale, call.plan.owners


def test_opcheck() -> None:
    call = make(torch.float32)
    torch.library.opcheck(torch.ops.tcurlora.ride_many.default, forward_arguments(call))
    torch.library.opcheck(torch.ops.tcurlora.riding_many.default, layer_arguments(call))
    _, h = torch.ops.tcurlora.ride_many(*forward_arguments(call))
    for given, needs_h in ((h, True), (None, True), (h, False)):
        torch.library.opcheck(torch.ops.tcurlora.ride_many_backward.default, backward_arguments(call, given, needs_h))


def test_wrong_arguments_are_errors() -> None:
    call = make(torch.float32)
    x, row, cores, columns, gain, scale, owners = forward_arguments(call)
    ride = torch.ops.tcurlora.ride_many
    with pytest.raises(IndexError, match=r"owners has 5, expected numbers from -1 to 4"):
        ride(x, row, cores, columns, gain, scale, torch.full_like(owners, 5))
    with pytest.raises(IndexError, match=r"column 24 is out of range: x has 24 features"):
        ride(x, row, cores, torch.full_like(columns, 24), gain, scale, owners)
    with pytest.raises(ValueError, match=r"cores is torch\.float64, expected torch\.float32"):
        ride(x, row, cores.double(), columns, gain, scale, owners)
    with pytest.raises(ValueError, match=r"owners has shape \(3,\), expected \(700,\)"):
        ride(x, row, cores, columns, gain, scale, owners[:3])
    g, h, *_, order, ends, _ = backward_arguments(call, torch.zeros(700, 11))
    for wrong_order, wrong_ends in ((order + 700, ends), (order, ends + 700)):
        with pytest.raises(IndexError, match="expected numbers from 0"):
            torch.ops.tcurlora.ride_many_backward(g, h, cores, columns, gain, scale, wrong_order, wrong_ends, True)
    arguments = list(layer_arguments(call))
    arguments[7] = 2
    with pytest.raises(ValueError, match="slice 2 asked for"):
        torch.ops.tcurlora.riding_many(*arguments)


def test_flops_are_counted() -> None:
    flops.register()  # as when a stack is built
    call, tokens, (in_, out), (c, r) = make(torch.float32), 700, (24, 10), (5, 11)
    own = int((call.plan.owners >= 0).sum())
    with FlopCounterMode(display=False) as counter:
        results(call)
    forward = 2 * tokens * (in_ * out + r * in_ + c * r)
    backward = 2 * tokens * in_ * out + 2 * 2 * own * c * r  # PyTorch counts no addmm_, which adds dh R to dx
    assert counter.get_total_flops() == 2 * forward + backward


def test_gradients_of_gathered_cores_go_to_their_parameters() -> None:
    parameters = [torch.nn.Parameter(torch.full((2, 3), float(at))) for at in range(3)]
    copied = torch.zeros(5, 2, 3)
    gathered = torch.ops.tcurlora.gathered(copied, [4, 0, 2], parameters)
    assert torch.equal(gathered, copied)
    weights = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    for _ in range(2):  # several backward passes may go through one such node
        (weights * gathered).sum().backward(retain_graph=True)
    for at, parameter in zip([4, 0, 2], parameters, strict=True):
        assert_close(parameter.grad, torch.full((2, 3), 2.0 * at))
    with torch.no_grad():
        assert not torch.ops.tcurlora.gathered(copied, [0], parameters[:1]).requires_grad
    with pytest.raises(ValueError, match="2 positions for 1"):
        torch.ops.tcurlora.gathered(copied, [0, 1], parameters[:1])
    with pytest.raises(IndexError, match="position 5 is out of range"):
        torch.ops.tcurlora.gathered(copied, [5], parameters[:1])
