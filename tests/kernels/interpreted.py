"""The kernels in Triton's interpreter against eager in float64. test_interpreted.py runs this in separate processes.

TRITON_INTERPRET is read when a kernel is defined, so it is set before the process starts. bfloat16 is not tested here:
Triton's interpreter adds and multiplies it wrongly.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from tcurlora_ext.kernels import configs, launch, operator, plans
from tcurlora_ext.kernels.prepared import Prepared
from tcurlora_ext.operator.backends import eager

if os.environ.get("TRITON_INTERPRET") != "1" or not triton.knobs.runtime.interpret:
    raise RuntimeError("these cases are for Triton's interpreter: test_interpreted.py runs them")


def _cases() -> ModuleType:
    """The cases of the operator's own tests."""
    path = Path(__file__).parents[1] / "operator" / "conftest.py"
    spec = importlib.util.spec_from_file_location("operator_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


operator_cases = _cases()
build, LargestNew = operator_cases.build, operator_cases.LargestNew
ALL = [True] * 6
NAMES = ("x", "weight", "bias", "col", "core", "row")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that elements that no kernel writes are seen: outputs, m, p and the workspace.

    No plan of another test is used, which may have been made for another table.
    """
    plans.forget_plans()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Prepared]:
    """The launches that ran, in order."""
    seen: list[Prepared] = []
    run = Prepared.run

    def record(self: Prepared, given: dict[str, Any]) -> None:
        seen.append(self)
        run(self, given)

    monkeypatch.setattr(Prepared, "run", record)
    return seen


def names(launched: list[Prepared]) -> list[str]:
    return [one.kernel.__name__ for one in launched]


def take(monkeypatch: pytest.MonkeyPatch, table: configs.Table, descriptors: bool = True) -> None:
    """Let the operator use this table for any alignment of rows, with or without tensor descriptors."""
    monkeypatch.setattr(operator, "table_for", lambda name, aligned: table if aligned else configs.UNALIGNED)
    device = plans.Device("test", 3, descriptors)
    monkeypatch.setattr(operator, "device_of", lambda _: device)


ONE_LAUNCH = replace(configs.FALLBACK, fused_flops=float("inf"))
SEPARATE = replace(configs.FALLBACK, fused_q=0)


def run(module: Any, case: Any, g: Tensor, needs: list[bool] = ALL) -> tuple[Tensor, ...]:
    """y, h and the six gradients."""
    y, h = module.forward(case.x, case.weight, case.bias, case.factors)
    return y, h, *module.backward(g, case.x, h, case.weight, case.factors, needs)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative RMS error; absolute where the exact result is zero."""
    return float((found.double() - exact).norm() / (exact.norm() or 1.0))


def check(case: Any, dtype: torch.dtype, needs: list[bool] = ALL) -> tuple[Tensor, ...]:
    """Compare every result with float64 on the same rounded tensors: at most twice the error of eager in the dtype.

    An error of eps is allowed, too: with few elements (one token, one block) eager can be exact by chance, and each
    element has been rounded up to three times, as h, m and the result.
    """
    case = case.to(dtype)
    exact = case.to(torch.float64, torch.float64)
    g = torch.randn(*case.x.shape[:-1], case.weight.shape[0], dtype=torch.float64).to(dtype)
    found, same, right = run(operator, case, g, needs), run(eager, case, g, needs), run(eager, exact, g.double(), needs)
    for name, one, other, wanted in zip(("y", "h", *NAMES), found, same, right, strict=True):
        assert one.shape == other.shape, name
        assert one.dtype == other.dtype, name
        assert not one.isnan().any(), name
        limit = max(2 * error(other, wanted), torch.finfo(dtype).eps)
        assert error(one, wanted) <= limit, (name, error(one, wanted), limit)
    return found


DTYPES = [torch.float32, torch.float16]
# S, out, in, c, r, first slice, n, T: S of 1, 2, odd and even; ragged and odd sizes, tiles that are not full, one row.
SMALL = [
    (1, 33, 17, 2, 3, 0, 1, 1),
    (2, 40, 72, 3, 8, 0, 2, 63),
    (5, 35, 51, 3, 2, 2, 3, 63),
    (6, 64, 48, 8, 4, 3, 3, 130),
    (7, 72, 65, 1, 1, 6, 1, 63),
    (8, 48, 64, 8, 8, 1, 1, 33),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", ["dft", "dct"])
@pytest.mark.parametrize("table", [ONE_LAUNCH, SEPARATE], ids=["one-launch", "separate"])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_forward_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], table: configs.Table, transform: str, dtype: torch.dtype
) -> None:
    take(monkeypatch, table)
    *shape, T = sizes
    check(build(*shape, (T,), bias=T != 63, scale=0.1, transform=transform, seed=3), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", ["dft", "dct"])
@pytest.mark.parametrize(
    "sizes", [(48, 72, 80, 8, 8, 45, 3, 70), (47, 40, 48, 3, 5, 0, 1, 65), (9, 64, 64, 20, 24, 2, 2, 33)], ids=str
)
def test_q_over_several_tiles(
    launched: list[Prepared], sizes: tuple[int, ...], transform: str, dtype: torch.dtype
) -> None:
    """UNETR's attention (q = 384, three fused slices), groups of 10 columns, and one group per tile."""
    *shape, T = sizes
    check(build(*shape, (T,), scale=0.1, transform=transform, seed=4), dtype)
    assert names(launched) == ["project", "expand", "project_back", "expand", "partial_gradient", "reduce_gradient"]
    middle_tiles = -(-sizes[0] // 2 // launched[0].constants["GROUPS"])
    assert middle_tiles >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
def test_one_launch_where_all_groups_fit_one_tile(
    monkeypatch: pytest.MonkeyPatch, launched: list[Prepared], descriptors: bool, n: int, dtype: torch.dtype
) -> None:
    """Without a gradient of row, for which dh is stored. There are several tiles of rows, of columns and of K."""
    take(monkeypatch, ONE_LAUNCH, descriptors)
    check(build(6, 160, 96, 8, 8, 1, n, (130,), seed=5), dtype, [True, True, True, True, True, False])
    assert names(launched) == ["fused", "fused_back", "partial_gradient", "reduce_gradient"]
    assert launched[0].constants["DESCRIPTORS"] is launched[1].constants["DESCRIPTORS"] is descriptors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused_q", [0, 128])
@pytest.mark.parametrize(("T", "n"), [(70, 3), (1100, 1)])
def test_hopper_tables(monkeypatch: pytest.MonkeyPatch, T: int, n: int, fused_q: int, dtype: torch.dtype) -> None:
    """The tiles of the named GPUs, for few and for many tokens."""
    take(monkeypatch, replace(configs.TABLES["NVIDIA H200"], fused_q=fused_q))
    check(build(12, 136, 72, 8, 8, 1, n, (T,), scale=0.1, seed=6), dtype)


@pytest.mark.parametrize("transform", ["dft", "dct"])
def test_groups_too_wide_for_a_tile(launched: list[Prepared], transform: str) -> None:
    check(build(4, 96, 80, 70, 66, 1, 2, (65,), transform=transform, scale=0.02), torch.float32)
    assert names(launched) == ["expand", "expand"]


@pytest.mark.parametrize("core", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_core_of_another_dtype(core: torch.dtype) -> None:
    case = build(5, 24, 32, 4, 3, n=2, leading=(33,), scale=0.1).to(torch.float32, core)
    g = torch.randn(33, 48)
    found, right = run(operator, case, g), run(eager, case.to(torch.float64, torch.float64), g.double())
    assert found[6].dtype == core
    assert error(found[0], right[0]) < 1e-6
    assert error(found[6], right[6]) < 4 * torch.finfo(core).eps + 1e-6


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float64, the Triton kernels compute in torch\.float32"):
        run(operator, build(), torch.randn(4, 6, dtype=torch.float64))


def test_a_transform_without_middle_product_is_refused() -> None:
    with pytest.raises(ValueError, match="transform 'identity' has no middle product"):
        run(operator, build().to(torch.float32).replaced(transform="identity"), torch.randn(4, 6))


def test_rows_too_far_apart_are_refused() -> None:
    case = build(leading=(2,)).to(torch.float32)
    far = torch.zeros(2 * launch.LONGEST_STRIDE + 8).as_strided((2, 7), (launch.LONGEST_STRIDE + 1, 1))
    with pytest.raises(ValueError, match=r"strides \(4194305, 1\), the Triton kernels take at most 4,194,304"):
        operator.forward(far, case.weight, case.bias, case.factors)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (), (2, 3), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("table", [ONE_LAUNCH, SEPARATE], ids=["one-launch", "separate"])
def test_leading_shapes_and_no_rows_at_all(
    monkeypatch: pytest.MonkeyPatch, launched: list[Prepared], table: configs.Table, leading: tuple[int, ...]
) -> None:
    take(monkeypatch, table)
    results = check(build(4, 24, 32, 4, 4, n=2, leading=leading), torch.float32)
    assert results[0].shape == (*leading, 48)
    if 0 in leading:
        assert launched == []
        assert not any(gradient.any() for gradient in results[2:])


@pytest.mark.parametrize("wanted", [*NAMES, ("x", "core"), ("core", "col"), ("x", "row")], ids=str)
@pytest.mark.parametrize("saved", ["h", "x", "both"])
@pytest.mark.parametrize("table", [ONE_LAUNCH, SEPARATE], ids=["one-launch", "separate"])
def test_only_the_gradients_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, table: configs.Table, saved: str, wanted: str | tuple[str, ...]
) -> None:
    asked = (wanted,) if isinstance(wanted, str) else wanted
    if saved == "h" and {"weight", "row"} & set(asked):
        pytest.skip("these need x")
    take(monkeypatch, table)
    case = build(4, 24, 32, 4, 4, n=2, leading=(19,)).to(torch.float32)
    g, needs = torch.randn(19, 48), [name in asked for name in NAMES]
    rest = (case.weight, case.factors, needs)
    h = eager.forward(case.x, case.weight, case.bias, case.factors)[1]
    kept = (case.x if saved != "h" else None, h if saved != "x" else None)
    for name, found, right in zip(NAMES, operator.backward(g, *kept, *rest), eager.backward(g, case.x, h, *rest),
                                  strict=True):  # fmt: skip
        assert found.shape == right.shape, name
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_what_was_not_saved_is_named() -> None:
    case = build().to(torch.float32)
    with pytest.raises(ValueError, match="x or h was not saved"):
        operator.backward(torch.randn(4, 6), None, None, case.weight, case.factors, [False] * 4 + [True, False])


def _strided(tensor: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "every second":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1).flatten(-2)[..., ::2]
    if kind == "rows apart":
        return torch.cat([tensor, torch.full_like(tensor, float("nan"))], -1)[..., : tensor.shape[-1]]
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("kind", ["transposed", "every second", "rows apart", "expanded"])
@pytest.mark.parametrize("table", [ONE_LAUNCH, SEPARATE], ids=["one-launch", "separate"])
def test_strides_change_nothing(monkeypatch: pytest.MonkeyPatch, table: configs.Table, kind: str) -> None:
    """For the strides of every operand; a transposed weight, as GPT-2's Conv1D has it, is not copied."""
    take(monkeypatch, table)
    case = build(6, 64, 64, 4, 4, n=2, leading=(33,)).to(torch.float32)
    other = case.replaced(**{name: _strided(getattr(case, name), kind) for name in ("x", "weight", "col", "row")})
    same = case.replaced(**{name: getattr(other, name).contiguous() for name in ("x", "weight", "col", "row")})
    g = _strided(torch.randn(33, 128), kind)
    for found, right in zip(run(operator, other, g), run(operator, same, g.contiguous()), strict=True):
        assert error(found, right.double()) < 1e-6


@pytest.mark.parametrize("table", [ONE_LAUNCH, SEPARATE], ids=["one-launch", "separate"])
def test_the_same_call_twice_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, table: configs.Table) -> None:
    take(monkeypatch, table)
    case = build(8, 40, 48, 8, 8, 1, 3, (700,)).to(torch.float16)
    g = torch.randn(700, 120).half()
    needs = [True, False, False, False, True, False]
    first, second = run(operator, case, g, needs), run(operator, case, g, needs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_core_gradient_of_half_precision_is_summed_in_float32() -> None:
    """4096 equal contributions in 16 chunks: a running sum in float16 would stop growing at 2048."""
    case = build(S=1, out=1, in_=1, c=1, r=1, leading=(4096,), scale=1.0).to(torch.float16)
    case = case.replaced(**{name: torch.ones_like(getattr(case, name)) for name in ("x", "col", "row")})
    assert float(run(operator, case, torch.ones(4096, 1).half())[6]) == 4096.0


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "transposed"])
@pytest.mark.parametrize("table", [ONE_LAUNCH, SEPARATE], ids=["one-launch", "separate"])
def test_no_tensor_of_the_size_of_a_weight_is_made(
    monkeypatch: pytest.MonkeyPatch, launched: list[Prepared], table: configs.Table, kind: str, n: int
) -> None:
    out, in_, T = 150, 170, 11
    take(monkeypatch, table)
    case = build(S=5, out=out, in_=in_, c=3, r=2, n=n, leading=(T,)).to(torch.float32)
    if kind == "transposed":
        case = case.replaced(weight=_strided(case.weight, kind))
    legitimate = max(T * n * out, T * in_, out * 15, in_ * 10)
    assert legitimate < out * in_  # or the test could not tell
    g = torch.randn(T, n * out)
    # The interpreter copies what a kernel takes and gives back, so launches are left out of the watch.
    watch = LargestNew(*case.tensors, g)
    interpret = Prepared.run

    def unwatched(self: Prepared, given: dict[str, Any]) -> None:
        watch.__exit__(None, None, None)
        interpret(self, given)
        watch.__enter__()

    monkeypatch.setattr(Prepared, "run", unwatched)
    with watch:
        run(operator, case, g, [True, False, True, True, True, True])
    assert T * n * out <= watch.largest <= legitimate
    assert len(launched) >= 4


def test_layers_of_one_layout_share_a_plan_and_keep_their_own_numbers_and_tensors() -> None:
    """Slices, scales and tensors of two layers; then another core dtype, a bias, more tokens: a plan each."""
    made = []
    for first, scale, seed, options in (
        (0, 0.1, 1, {}), (2, 0.7, 2, {}), (1, 0.3, 3, {"bias": False}), (1, 0.3, 4, {"leading": (20,)}),
    ):  # fmt: skip
        check(
            build(5, 40, 48, 4, 4, first, 2, **{"leading": (19,), "scale": scale, "seed": seed} | options),
            torch.float32,
        )
        made.append(len(plans._PLANS))
    # Forward, backward and the core's gradient; without a bias only forward differs.
    assert made == [3, 3, 4, 7]


def test_tensors_at_an_odd_address_have_a_plan_of_their_own() -> None:
    case = build(4, 24, 32, 4, 4, leading=(19,)).to(torch.float32)
    right = run(operator, case, torch.ones(19, 24))
    moved = case.replaced(x=torch.cat([torch.zeros(1), case.x.flatten()])[1:].view(19, 32))
    assert moved.x.data_ptr() % 16 != 0
    for found, same in zip(run(operator, moved, torch.ones(19, 24)), right, strict=True):
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32")])
def test_float32_products_follow_the_setting_of_pytorch(setting: str, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    assert operator.precision() == expected
    torch.set_float32_matmul_precision(before)


def test_the_registered_operators_with_this_backend() -> None:
    """Schemas, fakes and autograd by opcheck; outputs must not share memory, for any set of gradients."""
    case = build(S=6, n=2, backend="triton").to(torch.float32)
    torch.library.opcheck(torch.ops.tcurlora.linear.default, case.training("x", "core").arguments)
    y, h = torch.ops.tcurlora.forward(*case.arguments)
    first, n, scale, transform, backend = case.arguments[6:]
    arguments = {
        "g": torch.randn_like(y), "x": case.x, "h": h, "weight": case.weight, "col": case.col, "core": case.core,
        "row": case.row, "first_slice": first, "num_slices": n, "scale": scale, "transform": transform,
        "backend": backend,
    }  # fmt: skip
    for needs in (ALL, [True, False, False, False, True, False], [False] * 6):
        torch.library.opcheck(torch.ops.tcurlora.backward.default, (), arguments | {"needs": needs})
