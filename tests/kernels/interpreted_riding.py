"""The riding form's kernels in Triton's interpreter against eager in float64; test_interpreted.py runs this.

What tests/operator/test_riding.py shows of every backend is not repeated here: it runs in the interpreter too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from tcurlora_ext.kernels import configs, plans
from tcurlora_ext.kernels.prepared import Prepared
from tcurlora_ext.kernels.riding import launch, operator
from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator.backends import BACKENDS, eager

if os.environ.get("TRITON_INTERPRET") != "1" or not triton.knobs.runtime.interpret:
    raise RuntimeError("these cases are for Triton's interpreter: test_interpreted.py runs them")

ALL = (True, True, True)
NAMES = ("x'", "h", "dx", "dcore", "drow")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that elements that no kernel writes are seen; no plan of another test is used."""
    plans.forget_plans()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, in order."""
    seen: list[str] = []
    run = Prepared.run

    def record(self: Prepared, given: dict[str, Any]) -> None:
        seen.append(self.kernel.__name__)
        run(self, given)

    monkeypatch.setattr(Prepared, "run", record)
    return seen


def build(S: int, c: int, r: int, in_: int, T: int, scale: float = 0.3) -> tuple[Tensor, Tensor, Riding]:
    """x and the gradient of x' (T, in), and an adapter of the stack's last slice; float64."""
    f64 = torch.float64
    adapter = Riding(
        torch.randperm(in_)[:c], torch.randn(S, c, r, dtype=f64), torch.randn(S * r, in_, dtype=f64) / in_**0.5,
        torch.rand(c, dtype=f64) + 0.5, S - 1, scale,
    )  # fmt: skip
    return torch.randn(T, in_, dtype=f64), torch.randn(T, in_, dtype=f64), adapter


def cast(adapter: Riding, dtype: torch.dtype, core: torch.dtype = torch.float32) -> Riding:
    return adapter._replace(core=adapter.core.to(core), row=adapter.row.to(dtype), gain=adapter.gain.to(core))


def run(module: Any, x: Tensor, g: Tensor, adapter: Riding, needs: tuple[bool, ...] = ALL) -> tuple[Tensor, ...]:
    """x', h, what becomes of g, and the gradients of core and row; x is passed only where it is needed."""
    changed, h = module.ride(x, adapter)
    dx = g.clone()
    found = module.ride_back(dx, x if needs[2] else None, h if needs[1] else None, adapter, needs)
    return changed, h, dx, *found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / (exact.norm() or 1.0))


def check(x: Tensor, g: Tensor, adapter: Riding, dtype: torch.dtype, needs: tuple[bool, ...] = ALL) -> None:
    """At most twice the error of eager in the dtype against float64 on the same rounded tensors, or one eps."""
    low = cast(adapter, dtype)
    x, g, exact = x.to(dtype), g.to(dtype), cast(low, torch.float64, torch.float64)
    right = run(eager, x.double(), g.double(), exact, needs)
    found, same = run(operator, x, g, low, needs), run(eager, x, g, low, needs)
    for name, one, other, wanted in zip(NAMES, found, same, right, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        assert not one.isnan().any(), name
        limit = max(2 * error(other, wanted), torch.finfo(dtype).eps)
        assert error(one, wanted) <= limit, (name, error(one, wanted), limit)


# S, c, r, in, T: one and several slices; c and r below, at and between the tiles' sizes; odd widths and one token.
SIZES = [
    (1, 1, 1, 17, 1), (3, 3, 5, 33, 63), (1, 8, 8, 96, 70), (2, 17, 24, 64, 33), (1, 64, 64, 80, 40), (1, 40, 2, 51, 9),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("table", ["fallback", "NVIDIA H200"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_changed_input_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, launched: list[str], sizes: tuple[int, ...], table: str, dtype: torch.dtype
) -> None:
    """Rows that are not aligned take the table for those."""
    if table != "fallback":
        monkeypatch.setattr(operator, "device_of", lambda _: plans.Device(table, 3, False))
    check(*build(*sizes), dtype)
    assert launched == ["ride", "ride_back", "reduce_chunks"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_tokens_than_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Programs of two blocks of tokens, of which the last is cut off; more chunks than are loaded at once."""
    monkeypatch.setattr(launch, "MOST_CHUNKS", 35)
    config = configs.FALLBACK.config("ride_back", dtype, 0)
    T = 69 * config.block_m + 3
    _, g, adapter = build(2, 4, 8, 16, T)
    low, h = cast(adapter, dtype), torch.randn(T, 8).to(dtype)
    assert launch.workspace_shape(adapter.core, T, config)[0] == 35 > launch.REDUCED["CHUNKS"]
    assert launch.chunk_rows(T, config) == 2 * config.block_m
    exact = cast(low, torch.float64, torch.float64)
    dx, right_dx = g.to(dtype), g.to(dtype).double()
    dcore, _ = operator.ride_back(dx, None, h, low, (True, True, False))
    right, _ = eager.ride_back(right_dx, None, h.double(), exact, (True, True, False))
    assert error(dcore, right) < 1e-6
    assert error(dx, right_dx) < torch.finfo(dtype).eps


@pytest.mark.parametrize("needs", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
def test_only_what_is_asked_for(launched: list[str], needs: tuple[bool, bool, bool]) -> None:
    """Without a gradient of x, g stays as it is: operator/riding/products.py then passes p alone."""
    x, g, adapter = build(2, 5, 3, 32, 37)
    check(x, g, adapter, torch.float32, needs)
    expected = ["ride_back", "reduce_chunks"] if needs[1] else ["ride_back"]
    assert launched[1:] == (expected if any(needs) else [])
    g32 = g.float()
    kept = g32.clone()
    _, h = operator.ride(x.float(), cast(adapter, torch.float32))
    operator.ride_back(g32, x.float(), h, cast(adapter, torch.float32), needs)
    assert torch.equal(g32, kept) is not needs[0]


def strided(tensor: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return tensor.T.contiguous().T
    if kind == "every second":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1).flatten(-2)[..., ::2]
    if kind == "rows apart":
        return torch.cat([tensor, torch.full_like(tensor, float("nan"))], -1)[..., : tensor.shape[-1]]
    return torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.flatten()])[1:].view(tensor.shape)  # an odd address


@pytest.mark.parametrize("kind", ["transposed", "every second", "rows apart", "odd address"])
def test_strides_change_nothing(kind: str) -> None:
    x, g, adapter = build(2, 8, 4, 64, 33)
    x, g, adapter = x.float(), g.float(), cast(adapter, torch.float32)
    pairs = torch.stack([adapter.columns] * 2, 1)[:, 0], torch.stack([adapter.gain] * 2, 1)[:, 0]
    other = adapter._replace(
        columns=pairs[0], gain=pairs[1], row=strided(adapter.row, kind),
        core=adapter.core.transpose(1, 2).contiguous().transpose(1, 2),
    )  # fmt: skip
    changed, h = operator.ride(strided(x, kind), other)
    dx = strided(g, kind)
    found = changed, h, dx, *operator.ride_back(dx, strided(x, kind), strided(h, kind), other, ALL)
    for name, one, right in zip(NAMES, found, run(eager, x, g, adapter), strict=True):
        assert error(one, right.double()) < 1e-6, name


@pytest.mark.parametrize("core", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_core_of_another_dtype(core: torch.dtype) -> None:
    x, g, adapter = build(2, 5, 3, 24, 33)
    low = cast(adapter, torch.float32, core)
    found = run(operator, x.float(), g.float(), low)
    right = run(eager, x.float().double(), g.float().double(), cast(low, torch.float64, torch.float64))
    assert found[3].dtype == core
    for name, one, wanted in zip(NAMES, found, right, strict=True):
        assert error(one, wanted) < (4 * torch.finfo(core).eps if name == "dcore" else 0) + 1e-6, name


def test_no_tokens(launched: list[str]) -> None:
    check(*build(2, 4, 3, 16, 0), torch.float32)
    assert launched == []


def test_a_column_outside_of_x_is_neither_read_nor_written() -> None:
    x, _, adapter = build(1, 3, 2, 16, 5)
    adapter = cast(adapter, torch.float32)
    wrong = adapter._replace(columns=torch.tensor([int(adapter.columns[0]), 16, -1]))
    alone = adapter._replace(core=adapter.core * torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1))
    assert torch.equal(operator.ride(x.float(), wrong)[0], operator.ride(x.float(), alone)[0])


@pytest.mark.parametrize(("c", "r"), [(65, 4), (4, 65)])
def test_wider_tiles_than_the_kernels_have_are_eagers(launched: list[str], c: int, r: int) -> None:
    x, g, adapter = build(1, c, r, 96, 7)
    backend = BACKENDS["triton"]
    for one, right in zip(run(backend, x, g, adapter), run(eager, x, g, adapter), strict=True):
        assert torch.equal(one, right)
    assert launched == []


def test_float64_is_refused() -> None:
    x, g, adapter = build(1, 3, 2, 16, 5)
    needs = True, False, False
    for call in (lambda: operator.ride(x, adapter), lambda: operator.ride_back(g, None, None, adapter, needs)):
        with pytest.raises(ValueError, match=r"x is torch\.float64, the Triton kernels compute in torch\.float32"):
            call()


def test_what_was_not_saved_is_named() -> None:
    _, g, adapter = build(1, 3, 2, 16, 5)
    low = cast(adapter, torch.float32)
    for needs, name in (((False, True, False), "h"), ((False, False, True), "x")):
        with pytest.raises(ValueError, match=f"{name} was not saved for this gradient"):
            operator.ride_back(g.float(), None, None, low, needs)


def test_the_same_call_twice_gives_the_same_bits() -> None:
    x, g, adapter = build(1, 8, 8, 32, 700)
    low = cast(adapter, torch.float16)
    first, second = (run(operator, x.half(), g.half(), low) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_core_gradient_of_half_precision_is_summed_in_float32() -> None:
    """4,096 equal contributions: a running sum in float16 would stop growing at 2,048."""
    one = Riding(torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, 1), torch.ones(1, 1).half(), torch.ones(1), 0, 1.0)
    ones = torch.ones(4096, 1).half()
    assert float(operator.ride_back(ones.clone(), None, ones, one, (False, True, False))[0]) == 4096.0


def test_layers_of_one_layout_share_a_plan_and_keep_their_own_numbers_and_tensors() -> None:
    """Slices, scales and tensors of two layers; then other needs and another number of tokens: a plan each."""
    made = []
    core_alone = True, True, False
    for at, scale, T, needs in ((0, 0.1, 19, ALL), (1, 0.7, 19, ALL), (0, 0.2, 19, core_alone), (0, 0.1, 20, ALL)):
        x, g, adapter = build(2, 4, 3, 32, T, scale)
        check(x, g, adapter._replace(slice_index=at), torch.float32, needs)
        made.append(len(plans._PLANS))
    assert made == [2, 2, 3, 5]


def test_the_registered_steps_change_g_in_place() -> None:
    """opcheck finds an output that shares memory with an input, and a change that the schema does not name."""
    x, g, adapter = build(2, 4, 3, 24, 9)
    x, g, adapter = x.float(), g.float(), cast(adapter, torch.float32)
    _, h = torch.ops.tcurlora.ride_forward(x, *adapter, "triton")
    for needs in (ALL, (True, True, False), (False, True, False)):
        torch.library.opcheck(torch.ops.tcurlora.ride_backward.default, (g, x, h, *adapter, list(needs), "triton"))
