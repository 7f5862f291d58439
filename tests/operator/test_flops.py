"""PyTorch's FLOP counts for the operators, against its counts for the same products in PyTorch operations."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.operator import flops
from tcurlora_ext.operator.backends import eager

CASES = [
    {"S": 1},
    {"S": 2, "leading": (2, 3)},
    {"S": 5, "n": 2, "first": 1, "leading": (), "in_": 40},
    {"S": 6, "n": 3, "bias": False, "c": 2, "r": 4},
    {"S": 4, "transform": "dct", "n": 2},
    {"S": 3, "leading": (0,)},
]
cases = pytest.mark.parametrize("options", CASES, ids=str)
flops.register()  # as the first stack does; these tests call the operators without one
NAMES = ("x", "weight", "bias", "col", "core", "row")


def count(call: Callable[[], object]) -> int:
    """PyTorch's count, with the in-place addmm added, which it does not count."""
    return _count(call, {})


def count_eager(call: Callable[[], object], case: Any) -> int:
    """Eager's count with each middle product as one of block-diagonal matrices: eager pads groups of blocks, by bmm."""
    one = middle_flops(case)
    return _count(call, {torch.ops.aten.bmm: lambda *_, **__: one, torch.ops.aten.baddbmm: lambda *_, **__: 0})


def _count(call: Callable[[], object], counts: dict[Any, Callable[..., int]]) -> int:
    def addmm_(_: Any, a: tuple[int, int], b: tuple[int, int], **options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_, **counts}) as counter:
        call()
    return counter.get_total_flops()


def middle_flops(case: Any) -> int:
    """FLOPs of m = h B^T: every entry of the blocks of B times every token."""
    blocks = MiddleBlocks(case.core, case.first_slice, case.num_slices, case.transform)
    return 2 * case.x.shape[:-1].numel() * (blocks.single.numel() + blocks.pair.numel())


def build(make_case: Callable[..., Any], options: dict[str, Any]) -> Any:
    return make_case(**options).to(torch.float32)


@cases
def test_forward_counts_the_products_of_the_folded_form(make_case: Callable[..., Any], options: dict[str, Any]) -> None:
    case = build(make_case, options)
    expected = count_eager(lambda: eager.forward(case.x, case.weight, case.bias, case.factors), case)
    assert count(lambda: torch.ops.tcurlora.forward(*case.arguments)) == expected
    assert count(lambda: torch.ops.tcurlora.linear(*case.arguments)) == expected
    with torch.inference_mode():
        assert count(lambda: torch.ops.tcurlora.linear(*case.arguments)) == expected
    assert (expected > 0) == (case.x.numel() > 0)


@cases
@pytest.mark.parametrize("kept", [("x", "h"), ("x",)], ids="-".join)
def test_backward_counts_the_products_of_every_set_of_gradients(
    make_case: Callable[..., Any], options: dict[str, Any], kept: tuple[str, ...]
) -> None:
    case = build(make_case, options)
    y, h = torch.ops.tcurlora.forward(*case.arguments)
    tensors = (torch.randn_like(y), case.x, h if "h" in kept else None, case.weight)
    *factors, transform = case.factors
    for needs in itertools.product([False, True], repeat=6):
        expected = count_eager(lambda needs=needs: eager.backward(*tensors, case.factors, needs), case)
        found = count(
            lambda needs=needs: torch.ops.tcurlora.backward(*tensors, *factors, needs, transform, case.backend)
        )
        assert found == expected, needs


def wide_products(case: Any) -> tuple[Tensor, ...]:
    """The base's and the adapter's wide products in PyTorch; sums and copies between them have no FLOPs."""
    x = case.x.flatten(0, -2)
    h = x @ case.row.T
    m = h.sum(-1, keepdim=True).expand(-1, case.num_slices * case.col.shape[1]).reshape(-1, case.col.shape[1])
    return torch.nn.functional.linear(x, case.weight, case.bias), m @ case.col.T


@pytest.mark.parametrize("in_", [40, 6])
@pytest.mark.parametrize("trained", [("core",), ("col", "core", "row"), ("weight", "core")], ids="-".join)
def test_a_step_counts_the_wide_products_of_a_plain_one_and_the_blocks_between_them(
    make_case: Callable[..., Any], trained: tuple[str, ...], in_: int
) -> None:
    T, S, r = 9, 5, 2
    case = build(make_case, {"S": S, "r": r, "n": 2, "in_": in_, "leading": (T,)}).training("x", *trained)
    middle = middle_flops(case)
    plain: list[Tensor] = []
    ours: list[Tensor] = []
    forward = count(lambda: plain.extend(wide_products(case))) + middle
    assert count(lambda: ours.append(torch.ops.tcurlora.linear(*case.arguments))) == forward
    backward = count(lambda: torch.autograd.backward(plain, [torch.ones_like(y) for y in plain]))
    backward += 2 * middle  # dh and dcore
    if "col" in trained:
        backward += middle  # m is not kept
    if S * r > in_:
        backward += 2 * T * S * r * in_  # neither is h
    assert count(lambda: ours[0].sum().backward()) == backward


def test_tensors_without_data_count_the_same(make_case: Callable[..., Any]) -> None:
    case = build(make_case, {"S": 6, "n": 2})
    there = [None if t is None else t.to("meta") for t in case.tensors]
    found = count(lambda: torch.ops.tcurlora.linear(*there, *case.arguments[6:]))
    assert found == count(lambda: torch.ops.tcurlora.linear(*case.arguments))


BOTH_ORDERS = """
import sys
import torch
if sys.argv[1] == "before":
    import torch.utils.flop_counter
known = "torch.utils.flop_counter" in sys.modules
import tcurlora_ext as tcur
assert ("torch.utils.flop_counter" in sys.modules) == known, "importing this package imports the counter"
layers = {"forward": tcur.TCURLinear(8, 8, rank=2, slices=2), "riding_forward": tcur.TCURLinear(8, 8, rank=2)}
from torch.utils.flop_counter import FlopCounterMode
for name, layer in layers.items():
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 8))
    assert getattr(torch.ops.tcurlora, name) in counter.get_flop_counts()["TCURLinear"]
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_counter_may_be_imported_before_or_after(order: str) -> None:
    subprocess.run([sys.executable, "-c", BOTH_ORDERS, order], check=True)
