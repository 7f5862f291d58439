"""One stack: its dW against the definition, its core in both domains, scale and trained factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.maths import folding, reference, scale
from tcurlora_ext.maths.selection import Selection, select
from tcurlora_ext.maths.transforms import TRANSFORMS

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def stack_of(W: Tensor, rank: Any = (3, 2), core: bool = True, **options: Any) -> tcur.TCURStack:
    stack = tcur.TCURStack.from_weights(W, rank, **options)
    if core:
        stack.set_core_slices(torch.randn(stack.core.shape, dtype=W.dtype))
    return stack


def weights(S: int = 5, out: int = 6, in_: int = 7) -> Tensor:
    return torch.randn(S, out, in_, dtype=torch.float64)


def test_the_dense_delta_equals_the_golden_one(golden: dict[str, Tensor]) -> None:
    W = golden["W"]
    rank = golden["columns"].numel(), golden["rows"].numel()
    stack = tcur.TCURStack.from_weights(W, rank)
    stack.set_core_slices(golden["U"])
    # The same features in another order are the same change only with the core in that order.
    chosen = Selection(golden["rows"], golden["columns"], torch.zeros(rank[1]), torch.zeros(rank[0]))
    ordered = tcur.TCURStack.from_weights(W, rank, chosen)
    ordered.set_core_slices(golden["U"])
    assert_close(ordered.C, golden["C"], **CLOSE)
    assert_close(ordered.R, golden["R"], **CLOSE)
    assert_close(ordered.delta_weights(), golden["delta"], **CLOSE)
    assert set(stack.rows.tolist()) == set(golden["rows"].tolist())
    assert set(stack.columns.tolist()) == set(golden["columns"].tolist())
    for s in range(W.shape[0]):
        y = ordered.adapt(golden["x"][s], torch.zeros_like(W[s]), None, s, 1)
        assert_close(y, golden["y"][s], **CLOSE)


@given(S=st.integers(1, 6), c=st.integers(1, 6), r=st.integers(1, 5), data=st.data())
def test_the_layer_equals_its_dense_delta(S: int, c: int, r: int, data: st.DataObject) -> None:
    transform = data.draw(st.sampled_from(list(TRANSFORMS)))
    domain = data.draw(st.sampled_from(["slice", "fourier"]))
    n = data.draw(st.integers(1, S))
    first = data.draw(st.integers(0, S - n))
    torch.manual_seed(S + c)
    W = weights(S, 5, 6)
    stack = stack_of(W, (c, r), transform=transform, core_domain=domain, scale=0.3)
    x, bias = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(n * 5, dtype=torch.float64)
    own = W[first : first + n].flatten(0, 1)
    delta = stack.delta_weights()[first : first + n].flatten(0, 1)
    expected = nn.functional.linear(x, own + delta, bias)
    y = stack.adapt(x, own, bias, first, n)
    assert_close(y, expected, **CLOSE)
    (found,), (right,) = (torch.autograd.grad(t.square().sum(), stack.core) for t in (y, expected))
    assert_close(found, right, rtol=1e-8, atol=1e-8)


@transforms
def test_the_dense_delta_is_the_definition_of_its_transform(transform: str) -> None:
    stack = stack_of(weights(), transform=transform, scale=2.0)
    C, U, R = stack.C, stack.core_slices(), stack.R
    if transform == "dft":
        expected = reference.delta_weights(C, U, R, 2.0)
    elif transform == "identity":
        expected = 2.0 * C @ U @ R
    else:
        matrix = folding.fold_core(torch.eye(5, dtype=torch.float64)[:, :, None], "dct")[:, :, 0]
        of = [torch.einsum("ks,smn->kmn", matrix, t) for t in (C, U, R)]
        expected = 2.0 * torch.einsum("ks,kmn->smn", matrix, of[0] @ of[1] @ of[2])
    assert_close(stack.delta_weights(), expected, **CLOSE)
    assert_close(stack.delta_weights(range(1, 3)), expected[1:3], **CLOSE)


@transforms
@pytest.mark.parametrize("S", [1, 2, 5, 6])
def test_both_core_domains_are_one_function(S: int, transform: str) -> None:
    W, U = weights(S), torch.randn(S, 3, 2, dtype=torch.float64)
    deltas, norms = [], []
    for domain in ("slice", "fourier"):
        stack = stack_of(W, transform=transform, core_domain=domain, core=False)
        stack.set_core_slices(U)
        assert_close(stack.core_slices(), U, **CLOSE)
        assert_close(stack.core_fourier(), folding.fold_core(U, transform), **CLOSE)
        deltas.append(stack.delta_weights())
        (gradient,) = torch.autograd.grad(deltas[-1].square().sum(), stack.core)
        norms.append(gradient.norm())
    assert_close(*deltas, **CLOSE)
    assert_close(*norms, **CLOSE)  # the change of domain is orthonormal


def test_set_core_slices_keeps_the_parameter_and_refuses_what_does_not_fit() -> None:
    stack = stack_of(weights(), core=False)
    core = stack.core
    with pytest.raises(ValueError, match=r"core has shape \(5, 2, 3\), expected \(5, 3, 2\)"):
        stack.set_core_slices(torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        stack.set_core_slices(torch.full((5, 3, 2), float("nan")))
    assert not core.any()
    stack.set_core_slices(torch.ones(5, 3, 2))
    assert stack.core is core
    assert core.any()


def test_the_core_starts_at_zero_in_at_least_float32() -> None:
    for dtype, wide in (
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):  # fmt: skip
        stack = stack_of(weights().to(dtype), core=False)
        assert stack.core.dtype == wide
        assert not stack.core.any()
        assert stack.core.requires_grad
        assert stack.col.dtype == stack.row.dtype == dtype
        assert [name for name, _ in stack.named_parameters()] == ["core"]


def test_factors_are_columns_and_rows_of_the_weights() -> None:
    W = weights()
    stack = stack_of(W)
    chosen = select(W, 3, 2)
    assert torch.equal(stack.rows, chosen.rows)
    assert torch.equal(stack.columns, chosen.columns)
    assert_close(stack.C, W[:, :, chosen.columns], **CLOSE)
    assert_close(stack.R, W[:, chosen.rows], **CLOSE)
    assert stack.col.shape == (6, 15)
    assert stack.row.shape == (10, 7)
    assert (stack.slices, stack.rank, stack.shape) == (5, (3, 2), (6, 7))


@transforms
def test_the_default_scale_is_unit_factors_and_the_rule(transform: str) -> None:
    W = weights()
    stack = stack_of(W, scale=None, alpha=4.0, transform=transform)
    C, R = scale.normalise_columns(W[:, :, stack.columns]), scale.normalise_rows(W[:, stack.rows])
    assert_close(stack.C, C, **CLOSE)
    assert_close(stack.R, R, **CLOSE)
    assert stack.scale == pytest.approx(scale.default_scale(C, R, 4.0, transform), rel=1e-9)
    assert stack_of(W, scale=1.0).scale == 1.0
    # The rule makes a stack indifferent to the size of its weights.
    first = stack_of(W, scale=None, core=False)
    second = stack_of(100 * W, scale=None, core=False)
    for stack in (first, second):
        stack.set_core_slices(torch.ones(5, 3, 2))
    assert_close(first.delta_weights(), second.delta_weights(), rtol=1e-9, atol=1e-9)


@transforms
def test_all_trains_c_u_and_r_with_the_right_gradients(transform: str) -> None:
    W = weights()
    stack = stack_of(W, transform=transform, trainable="all")
    assert {name for name, p in stack.named_parameters() if p.requires_grad} == {"core", "col", "row"}
    x, g = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    own = W[1:3].flatten(0, 1)
    wanted = (stack.core, stack.col, stack.row)
    found = torch.autograd.grad(stack.adapt(x, own, None, 1, 2), wanted, g)
    dense = x @ (own + stack.delta_weights()[1:3].flatten(0, 1)).T
    for a, b in zip(found, torch.autograd.grad(dense, wanted, g), strict=True):
        assert b.any()
        assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.zeros(3, 4), r"shape \(3, 4\), expected \(slices, out, in\)"),
        (torch.zeros(0, 4, 4), r"shape \(0, 4, 4\)"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"weights are torch\.int64"),
        (torch.zeros(1, 4, 4, device="meta"), "meta device"),
    ],
)
def test_weights_that_are_no_stack_are_refused(W: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tcur.TCURStack.from_weights(W, 1)


@pytest.mark.parametrize("option", ["selection", "transform", "core_domain", "trainable"])
def test_an_unknown_choice_is_refused_by_its_name(option: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){'rule' if option == 'selection' else option}.* 'fft'.*expected one of"):
        tcur.TCURStack.from_weights(torch.randn(2, 4, 4), 1, **{option: "fft"})


@pytest.mark.parametrize("rank", [8, (8, 1), (1, 7), (7, 7)])
def test_a_rank_larger_than_the_matrix_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"does not fit 6 x 7 weights: expected c <= 7 and r <= 6"):
        stack_of(weights(), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    W = weights(3)
    W[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"slice 1: 1 of 42 weights are NaN or infinite"):
        stack_of(W)
    with pytest.raises(ValueError, match=r"the middle one: 1 of 42"):
        stack_of(W, names=["first", "the middle one", "last"])


def test_weights_without_energy_have_no_default_scale() -> None:
    with pytest.raises(ValueError, match="all zero"):
        stack_of(torch.zeros(2, 4, 4), 1, scale=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["core", "all"])
def test_half_keeps_what_trains_in_float32(dtype: torch.dtype, trainable: str) -> None:
    stack = stack_of(weights().float(), trainable=trainable)
    before = stack.core.detach().clone()
    stack.core.grad = torch.ones_like(stack.core)
    stack.to(dtype)
    assert all(p.dtype == torch.float32 for p in stack.parameters())
    assert torch.equal(stack.core, before)
    assert stack.core.grad is not None
    assert stack.core.grad.dtype == torch.float32
    assert stack.rows.dtype == torch.int64
    expected = torch.float32 if trainable == "all" else dtype
    assert stack.col.dtype == stack.row.dtype == expected
    stack.double()
    assert stack.core.dtype == torch.float64


def test_the_state_holds_the_scale() -> None:
    W = weights()
    first, second = stack_of(W, scale=3.0), stack_of(W, scale=1.0)
    second.load_state_dict(first.state_dict())
    assert second.scale == 3.0
    assert torch.equal(second.delta_weights(), first.delta_weights())
    incomplete = {k: v for k, v in first.state_dict().items() if k != "scale"}
    with pytest.raises(RuntimeError, match="scale"):
        second.load_state_dict(incomplete)
