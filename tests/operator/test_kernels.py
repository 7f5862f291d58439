"""Every backend against the dense definition: golden vectors, gradients, shapes, and what it allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.maths import folding
from tcurlora_ext.operator.backends import eager
from tcurlora_ext.operator.functional import tcur_linear

GOLDEN = {"rtol": 1e-10, "atol": 1e-10}
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
NAMES = ("x", "weight", "bias", "col", "core", "row")


def call(case: Any) -> Tensor:
    return tcur_linear(
        *case.tensors, case.first_slice, case.num_slices, case.scale, transform=case.transform, backend=case.backend
    )


def test_forward_and_both_gradients_equal_the_golden_ones(golden: dict[str, Tensor], backend: str) -> None:
    W, col, row = golden["W"], folding.fold_columns(golden["C"]), folding.fold_rows(golden["R"])
    U = golden["U"].clone().requires_grad_()
    x = golden["x"].clone().requires_grad_()
    core = folding.fold_core(U)
    for_adapter = torch.zeros_like(W[0])
    ys = torch.stack(
        [tcur_linear(x[s], for_adapter, None, col, core, row, s, 1, 1.0, backend) for s in range(W.shape[0])]
    )
    assert_close(ys, golden["y"], **GOLDEN)
    dx, dU = torch.autograd.grad(ys, (x, U), golden["g"])
    assert_close(dx, golden["dx"], **GOLDEN)
    assert_close(dU, golden["dU"], **GOLDEN)


def test_the_base_and_the_scale_come_on_top_of_the_golden_adapter(golden: dict[str, Tensor], backend: str) -> None:
    W, col, row = golden["W"], folding.fold_columns(golden["C"]), folding.fold_rows(golden["R"])
    x, core = golden["x"], folding.fold_core(golden["U"])
    bias = torch.randn(W.shape[1], dtype=torch.float64)
    for s in range(W.shape[0]):
        y = tcur_linear(x[s], W[s], bias, col, core, row, s, 1, -3.0, backend)
        assert_close(y, x[s] @ W[s].T + bias - 3.0 * golden["y"][s], **GOLDEN)


@pytest.mark.parametrize("transform", ["dft", "dct"])
@pytest.mark.parametrize(("S", "first", "n"), [(1, 0, 1), (2, 1, 1), (5, 3, 2), (6, 0, 3), (6, 3, 3)])
def test_gradcheck_of_every_tensor(make_case: Callable[..., Any], S: int, first: int, n: int, transform: str) -> None:
    case = make_case(S, 3, 4, 2, 1, first, n, (2,), transform=transform).training(*NAMES)

    def function(*tensors: Tensor) -> Tensor:
        return call(case.replaced(**dict(zip(NAMES, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, case.tensors)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7))
leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(shape=shapes, leading=leading, data=st.data(), bias=st.booleans(), transform=st.sampled_from(["dft", "dct"]))
def test_any_shape_gives_the_definition_forward_and_backward(
    make_case: Callable[..., Any],
    shape: tuple[int, int, int],
    leading: tuple[int, ...],
    data: st.DataObject,
    bias: bool,
    transform: str,
) -> None:
    """S is 1, 2, odd or even; c and r differ; zero or more leading dimensions, also of size 0; fused slices."""
    S, out, in_ = shape
    c, r = data.draw(st.integers(1, in_), "c"), data.draw(st.integers(1, out), "r")
    n = data.draw(st.integers(1, min(S, 3)), "n")
    first = data.draw(st.integers(0, S - n), "first")
    case = make_case(S, out, in_, c, r, first, n, leading, bias, transform=transform, seed=S + out)
    case = case.training("x", "weight", "col", "core", "row")
    y = call(case)
    assert y.shape == (*leading, n * out)
    C = folding.unfold_columns(case.col, S, transform)
    U, R = folding.unfold_core(case.core, transform), folding.unfold_rows(case.row, S, transform)
    expected = case.replaced(C=C, U=U, R=R).reference()
    assert_close(y, expected, **CLOSE)
    wanted = (case.x, case.weight, case.col, case.core, case.row)
    g = torch.randn_like(y)
    for found, right in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g), strict=True):
        assert_close(found, right, rtol=1e-9, atol=1e-9)


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in another memory layout."""
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "every second":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2]
    return x[:1].expand_as(x)


@pytest.mark.parametrize("kind", ["transposed", "every second", "expanded"])
def test_a_non_contiguous_input_or_gradient_changes_nothing(make_case: Callable[..., Any], kind: str) -> None:
    case = make_case(leading=(4, 3)).training("core")
    x = strided(case.x, kind)
    assert not x.is_contiguous()
    y, expected = call(case.replaced(x=x)), call(case.replaced(x=x.contiguous()))
    assert_close(y, expected, **CLOSE)
    g = strided(torch.randn_like(y), kind)
    (found,) = torch.autograd.grad(y, case.core, g)
    (right,) = torch.autograd.grad(expected, case.core, g.contiguous())
    assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("transform", ["dft", "dct"])
def test_non_contiguous_weight_and_factors_change_nothing(make_case: Callable[..., Any], transform: str) -> None:
    """GPT-2's Conv1D passes its weight transposed, and the identity transform passes blocks of col."""
    case = make_case(n=2, transform=transform).training("x", "core")
    names = ("weight", "col", "core", "row")
    other = case.replaced(**{name: strided(getattr(case, name), "transposed") for name in names})
    y, expected = call(other), call(case)
    assert_close(y, expected, **CLOSE)
    g = torch.randn_like(y)
    for found, right in zip(
        torch.autograd.grad(y, (case.x, case.core), g), torch.autograd.grad(expected, (case.x, case.core), g),
        strict=True,
    ):  # fmt: skip
        assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2)])
def test_an_empty_input_gives_an_empty_output_and_zero_gradients(
    make_case: Callable[..., Any], leading: tuple[int, ...]
) -> None:
    case = make_case(leading=leading, n=2).training(*NAMES)
    y = call(case)
    assert y.shape == (*leading, 12)
    y.sum().backward()
    for name in NAMES:
        gradient = getattr(case, name).grad
        assert gradient.shape == getattr(case, name).shape, name
        assert not gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_zero_core_gives_the_base_output_bit_for_bit(
    make_case: Callable[..., Any], leading: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    case = make_case(S=4, out=33, in_=65, n=2, leading=leading, bias=bias).to(dtype)
    case = case.replaced(core=torch.zeros_like(case.core))
    base = torch.nn.functional.linear(case.x, case.weight, case.bias)
    if case.x.is_cuda and case.backend != "eager":  # the base is accumulated onto the adapter, or tiled otherwise
        assert_close(call(case), base)
    else:
        assert torch.equal(call(case), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_twice_gives_the_same_bits(make_case: Callable[..., Any], dtype: torch.dtype) -> None:
    case = make_case(S=6, out=40, in_=50, n=3, leading=(3, 67)).to(dtype).training(*NAMES)
    g = torch.randn(3, 67, 120).to(dtype)
    results = []
    for _ in range(2):
        y = call(case)
        results.append((y, *torch.autograd.grad(y, case.tensors, g)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n", [1, 3])
def test_no_tensor_of_the_size_of_a_weight_is_made(
    make_case: Callable[..., Any], largest_new: Callable[..., Any], n: int
) -> None:
    out, in_, T = 150, 170, 11
    case = make_case(S=5, out=out, in_=in_, c=3, r=2, n=n, leading=(T,))
    legitimate = max(T * n * out, T * in_, out * 15, in_ * 10)
    assert legitimate < out * in_  # or the test could not tell
    g = torch.randn(T, n * out, dtype=torch.float64)
    with largest_new(*case.tensors, g) as mode:
        _, h = eager.forward(case.x, case.weight, case.bias, case.factors)
        eager.backward(g, case.x, h, case.weight, case.factors, [True, False, True, True, True, True])
    assert T * n * out <= mode.largest <= legitimate
    with largest_new(*case.tensors) as mode:  # the watch sees what it should refuse
        torch.nn.functional.linear(case.x, case.weight + 1.0)
    assert mode.largest >= out * in_


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3])
def test_half_precision_errs_no_more_than_twice_a_plain_linear_of_that_dtype(
    make_case: Callable[..., Any], dtype: torch.dtype, n: int
) -> None:
    """Errors against float64 on the same rounded inputs are compared with those of nn.Linear with W + dW in the dtype.

    The factor is two because the adapter rounds both h and m, and nn.Linear rounds W + dW.
    """
    exact = make_case(S=6, out=48, in_=64, c=4, r=4, n=n, leading=(64,), scale=0.02, seed=3)
    half = exact.to(dtype)
    rounded = half.to(torch.float64, torch.float64).training("x", "core")
    C = folding.unfold_columns(rounded.col, 6)
    R, U = folding.unfold_rows(rounded.row, 6), folding.unfold_core(rounded.core)
    right = rounded.replaced(C=C, R=R, U=U).reference()
    g = torch.randn_like(right)
    g_half = g.to(dtype)
    right_dx, right_dcore = torch.autograd.grad(right, (rounded.x, rounded.core), g_half.double())

    half = half.training("x", "core")
    y = call(half)
    dx, dcore = torch.autograd.grad(y, (half.x, half.core), g_half)
    assert y.dtype == dx.dtype == dtype
    assert dcore.dtype == torch.float32

    # The dense form in the same dtype: dW from factors and core in float32, added and rounded.
    plain = half.training("x", "core")
    C32, R32 = folding.unfold_columns(plain.col.float(), 6), folding.unfold_rows(plain.row.float(), 6)
    delta = folding.slice_product(folding.slice_product(C32, folding.unfold_core(plain.core)), R32)
    total = (plain.weight.float() + plain.scale * delta[:n].flatten(0, 1)).to(dtype)
    y_plain = torch.nn.functional.linear(plain.x, total, plain.bias)
    dx_plain, dcore_plain = torch.autograd.grad(y_plain, (plain.x, plain.core), g_half)

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())

    assert error(y, right) <= 2 * error(y_plain, right)
    assert error(dx, right_dx) <= 2 * error(dx_plain, right_dx)
    assert error(dcore, right_dcore) <= 2 * error(dcore_plain, right_dcore)


def test_the_core_gradient_of_half_precision_is_summed_in_float32(make_case: Callable[..., Any]) -> None:
    """4096 equal contributions: a running sum in float16 or bfloat16 would stop growing much earlier."""
    case = make_case(S=1, out=1, in_=1, c=1, r=1, leading=(4096,), scale=1.0).to(torch.bfloat16).training("core")
    ones = torch.ones_like
    case = case.replaced(x=ones(case.x), col=ones(case.col), row=ones(case.row))
    (gradient,) = torch.autograd.grad(call(case).sum(), case.core)
    assert float(gradient) == 4096.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("core", [torch.float64, torch.float32, torch.bfloat16])
def test_a_core_of_any_dtype_gets_a_gradient_of_its_own(
    make_case: Callable[..., Any], dtype: torch.dtype, core: torch.dtype
) -> None:
    """For cores of a wider or a narrower dtype than that of the data."""
    case = make_case(S=6, n=2).to(dtype, core).training("x", "core")
    right = case.to(torch.float64, torch.float64).replaced(backend="eager").training("x", "core")
    call(case).sum().backward()
    call(right).sum().backward()
    for name in ("x", "core"):
        found, wanted = getattr(case, name).grad, getattr(right, name).grad
        assert found.dtype == getattr(case, name).dtype
        # A few roundings of the shorter of the two dtypes.
        limit = 20 * max(torch.finfo(dtype).eps, torch.finfo(core).eps)
        assert (found.double() - wanted).norm() <= limit * wanted.norm()


def test_factors_of_the_identity_transform_are_not_for_the_operator(make_case: Callable[..., Any]) -> None:
    case = make_case().replaced(transform="identity")
    with pytest.raises(ValueError, match="transform 'identity' has no middle product"):
        call(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", ["dft", "dct"])
@pytest.mark.parametrize(
    ("S", "c", "r", "n", "T"), [(48, 8, 8, 3, 130), (7, 3, 5, 2, 1), (12, 8, 8, 1, 300), (1, 2, 1, 1, 65)]
)
def test_backends_agree_on_sizes_that_fill_and_overflow_their_tiles(
    make_case: Callable[..., Any], S: int, c: int, r: int, n: int, T: int, transform: str, dtype: torch.dtype
) -> None:
    """With more tokens than one tile or partial sum has, and with 16 or fewer columns, against eager in float64."""
    exact = make_case(S, 24, 20, c, r, S - n, n, (T,), scale=0.1, transform=transform, seed=7)
    case = exact.to(dtype, torch.promote_types(dtype, torch.float32)).training("x", "core")
    right = case.to(torch.float64, torch.float64).replaced(backend="eager").training("x", "core")
    outputs, expected = call(case), call(right)
    outputs.backward(torch.ones_like(outputs))
    expected.backward(torch.ones_like(expected))
    for found, wanted in ((outputs, expected), (case.x.grad, right.x.grad), (case.core.grad, right.core.grad)):
        # Relative to the largest entry: sums of up to 300 terms, rounded a few times in the short dtype.
        error = (found.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 40 * torch.finfo(dtype).eps


def test_the_core_gradient_does_not_depend_on_the_number_of_threads(make_case: Callable[..., Any]) -> None:
    case = make_case(S=6, out=40, in_=50, n=3, leading=(700,)).to(torch.float32)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        training = case.training("core")
        call(training).square().sum().backward()
        found.append(training.core.grad)
    torch.set_num_threads(before)
    if case.backend == "native":
        assert torch.equal(*found)
    assert_close(*found)
