"""The registered operators as PyTorch sees them: schemas, fakes, autograd, autocast, compilation, saved memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.operator.functional import tcur_linear

NAMES = ("x", "weight", "bias", "col", "core", "row")
CASES = [
    {"S": 1},
    {"S": 2, "leading": (2, 3)},
    {"S": 5, "n": 2, "first": 1, "leading": ()},
    {"S": 6, "n": 3, "bias": False},
    {"S": 4, "transform": "dct", "leading": (0,)},
]
cases = pytest.mark.parametrize("options", CASES, ids=str)


# Every shape in float32, and every other dtype on one shape: what opcheck looks at depends on one or the other.
CHECKED = [(options, torch.float32) for options in CASES] + [(CASES[2], d) for d in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize(("options", "dtype"), CHECKED, ids=str)
def test_opcheck(make_case: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    case = make_case(**options).to(dtype, torch.promote_types(dtype, torch.float32)).training("x", "core")
    for operator in (torch.ops.tcurlora.linear.default, torch.ops.tcurlora.forward.default):
        torch.library.opcheck(operator, case.arguments, atol=1e-2 if dtype == torch.bfloat16 else None,
                              rtol=1e-2 if dtype == torch.bfloat16 else None)  # fmt: skip


def backward_arguments(case: Any, needs: list[bool]) -> dict[str, Any]:
    y, h = torch.ops.tcurlora.forward(*case.arguments)
    first, n, scale, transform, backend = case.arguments[6:]
    return {
        "g": torch.randn_like(y), "x": case.x, "h": h, "weight": case.weight, "col": case.col, "core": case.core,
        "row": case.row, "first_slice": first, "num_slices": n, "scale": scale, "transform": transform,
        "backend": backend, "needs": needs,
    }  # fmt: skip


@cases
def test_opcheck_of_backward(make_case: Callable[..., Any], options: dict[str, Any]) -> None:
    case = make_case(**options).to(torch.float32)
    for needs in ([True] * 6, [True, False, False, False, True, False], [False] * 6):
        torch.library.opcheck(torch.ops.tcurlora.backward.default, (), backward_arguments(case, needs))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fakes_agree_with_the_real_operators(
    make_case: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Shapes, dtypes and strides agree for every combination of gradients."""
    case = make_case(**options).to(dtype)
    fake = case.replaced(**{n: None if (t := getattr(case, n)) is None else t.to("meta") for n in NAMES})

    def seen(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
        return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]

    real, shapes = torch.ops.tcurlora.forward(*case.arguments), torch.ops.tcurlora.forward(*fake.arguments)
    assert seen(shapes) == seen(real)
    assert all(t.is_meta for t in shapes)
    for needs in itertools.product([True, False], repeat=6):
        arguments = backward_arguments(case, list(needs))
        on_meta = {name: a.to("meta") if isinstance(a, Tensor) else a for name, a in arguments.items()}
        real = torch.ops.tcurlora.backward(**arguments)
        assert seen(torch.ops.tcurlora.backward(**on_meta)) == seen(real), needs


def test_backward_computes_h_again_where_only_x_was_kept(make_case: Callable[..., Any]) -> None:
    arguments = backward_arguments(make_case(S=6, n=2), [True] * 6)
    both = torch.ops.tcurlora.backward(**arguments)
    only_x = torch.ops.tcurlora.backward(**arguments | {"h": None})
    for found, right in zip(only_x, both, strict=True):
        assert_close(found, right)
    with pytest.raises(ValueError, match="x was not saved"):
        torch.ops.tcurlora.backward(**arguments | {"x": None})


def test_backward_asked_for_one_gradient_gives_that_of_all(make_case: Callable[..., Any]) -> None:
    arguments = backward_arguments(make_case(S=6, n=2), [True] * 6)
    every = torch.ops.tcurlora.backward(**arguments)
    for i in range(6):
        some = torch.ops.tcurlora.backward(**arguments | {"needs": [j == i for j in range(6)]})
        assert torch.equal(some[i], every[i])
        assert [t.numel() for j, t in enumerate(some) if j != i] == [0] * 5


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="the profiler's view of the CPU's allocator")
@pytest.mark.parametrize("n", [1, 3])
def test_no_backend_allocates_a_weight(make_case: Callable[..., Any], n: int) -> None:
    """As seen by the allocator, for every backend: no block of memory for out x in elements, in forward or backward."""
    out, in_, T = 150, 170, 11
    case = make_case(S=5, out=out, in_=in_, n=n, leading=(T,)).training("x", "core")

    def largest(function: Callable[[], Any]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        events = profile.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    def step() -> None:
        torch.ops.tcurlora.linear(*case.arguments).sum().backward()

    step()  # the cached constants of the transform
    legitimate = 8 * max(T * n * out, T * in_)
    assert legitimate < 8 * out * in_  # or the test could not tell
    assert legitimate <= largest(step) < 2 * legitimate < 8 * out * in_
    assert largest(lambda: case.weight + 1.0) >= 8 * out * in_  # it sees what it should refuse


class Layer(nn.Module):
    def __init__(self, case: Any) -> None:
        super().__init__()
        self.case = case
        self.core = nn.Parameter(case.core.clone())

    def forward(self, x: Tensor) -> Tensor:
        c = self.case
        # Something before and after, so that there is a graph to compile.
        y = tcur_linear(
            x.sin(), c.weight, c.bias, c.col, self.core, c.row, c.first_slice, c.num_slices, c.scale,
            transform=c.transform,
        )  # fmt: skip
        return y.cos()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_one_graph_it_gives_the_same_results(make_case: Callable[..., Any], compiler: str) -> None:
    case = make_case(S=6, n=2, leading=(3, 5))
    plain = Layer(case)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend=compiler)
    for rows in (3, 3, 4):  # a second shape goes through the dynamic form
        x = torch.randn(rows, 5, 7, dtype=torch.float64)
        results = []
        for layer in (plain, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.square().sum().backward()
            results.append((y, leaf.grad, layer.core.grad))
        for found, right in zip(*results, strict=True):
            assert_close(found, right, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_autograd_gives_the_same_gradients(make_case: Callable[..., Any]) -> None:
    """A second call has other slices, for which the compiled graph must not use those of the first."""
    for first in (0, 2):
        eager, compiled = (make_case(S=6, n=2, first=first).training("x", "core") for _ in range(2))
        torch.ops.tcurlora.linear(*eager.arguments).square().sum().backward()
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            torch.ops.tcurlora.linear(*compiled.arguments).square().sum().backward()
        for name in ("x", "core"):
            assert_close(getattr(compiled, name).grad, getattr(eager, name).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("domain", ["slice", "fourier"])
@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
def test_a_layer_compiles_as_one_graph_in_every_form(transform: str, domain: str) -> None:
    layer = tcur.TCURLinear(8, 12, rank=2, slices=3, transform=transform, core_domain=domain)
    layer.stack.set_core_slices(torch.randn(3, 2, 2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    y = compiled(x)
    assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(y.sum(), layer.stack.core)
    (right,) = torch.autograd.grad(layer(x).sum(), layer.stack.core)
    assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_nn_linear(make_case: Callable[..., Any], dtype: torch.dtype) -> None:
    case = make_case(S=4, out=16, in_=16, leading=(8,)).to(torch.float32).training("x", "core")
    linear = nn.Linear(16, 16)
    with torch.autocast(torch.get_default_device().type, dtype):
        y = torch.ops.tcurlora.linear(*case.arguments)
        plain = linear(case.x)
    assert y.dtype == plain.dtype == dtype
    by_hand = case.to(dtype)
    assert torch.equal(y, torch.ops.tcurlora.linear(*by_hand.arguments))
    dx, dcore = torch.autograd.grad(y.float().sum(), (case.x, case.core))
    assert dx.dtype == dcore.dtype == torch.float32
    right = torch.autograd.grad(torch.ops.tcurlora.linear(*case.arguments).sum(), case.core)[0]
    # Rounding of x, h and m to 8 or 11 bits; not that of a sum in the low dtype.
    assert float((dcore - right).norm() / right.norm()) < 0.02


def test_a_backward_inside_autocast_gives_the_bits_of_one_outside(make_case: Callable[..., Any]) -> None:
    case = make_case(S=5, out=16, in_=16, n=2, leading=(64,)).to(torch.float32).training("x", "core")
    gradients = []
    for inside in (True, False):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            y = torch.ops.tcurlora.linear(*case.arguments)
            loss = y.float().square().sum()
            if inside:
                gradients.append(torch.autograd.grad(loss, (case.x, case.core)))
        if not inside:
            gradients.append(torch.autograd.grad(loss, (case.x, case.core)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def saved(case: Any) -> list[Tensor]:
    """The tensors that the operator saves for its backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.ops.tcurlora.linear(*case.arguments)
    return kept


FROZEN = ("weight", "col", "core", "row")  # in memory anyway


@pytest.mark.parametrize(("in_", "kept"), [(40, "h"), (6, "x")])
def test_for_the_gradient_of_the_core_the_smaller_of_h_and_x_is_kept(
    make_case: Callable[..., Any], in_: int, kept: str
) -> None:
    T, S, r = 9, 5, 2
    case = make_case(S=S, in_=in_, r=r, leading=(T,)).training("x", "core")
    held = {getattr(case, name).data_ptr() for name in FROZEN}
    extra = [t for t in saved(case) if t.data_ptr() not in held]
    assert [tuple(t.shape) for t in extra] == [(T, S * r) if kept == "h" else (T, in_)]
    assert (extra[0].data_ptr() == case.x.data_ptr()) == (kept == "x")


@pytest.mark.parametrize("wanted", [("x",), ("bias",), ("x", "bias")])
def test_neither_is_kept_where_no_gradient_uses_it(make_case: Callable[..., Any], wanted: tuple[str, ...]) -> None:
    case = make_case().training(*wanted)
    held = {getattr(case, name).data_ptr() for name in FROZEN}
    assert all(t.data_ptr() in held for t in saved(case))


@pytest.mark.parametrize("wanted", [("weight",), ("row",), ("weight", "core")])
def test_x_is_kept_where_a_gradient_needs_it(make_case: Callable[..., Any], wanted: tuple[str, ...]) -> None:
    case = make_case(in_=40).training(*wanted)
    assert case.x.data_ptr() in {t.data_ptr() for t in saved(case)}


def test_nothing_is_kept_without_gradients(make_case: Callable[..., Any]) -> None:
    case = make_case().training("x", "core")
    with torch.no_grad():
        assert saved(case) == []


@pytest.mark.parametrize("wanted", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_gradients_are_right_and_given_to_those_that_ask(
    make_case: Callable[..., Any], wanted: tuple[str, ...]
) -> None:
    asking, every = make_case(S=4, n=2).training(*wanted), make_case(S=4, n=2).training(*NAMES)
    torch.ops.tcurlora.linear(*asking.arguments).square().sum().backward()
    torch.ops.tcurlora.linear(*every.arguments).square().sum().backward()
    for name in NAMES:
        found = getattr(asking, name).grad
        if name in wanted:
            assert_close(found, getattr(every, name).grad)
        else:
            assert found is None


def test_the_second_derivative_is_refused(make_case: Callable[..., Any]) -> None:
    """It raises an error instead of silently being zero."""
    case = make_case().training("x", "core")
    y = torch.ops.tcurlora.linear(*case.arguments)
    (gradient,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tcurlora|twice|once_differentiable"):
        torch.autograd.grad(gradient.square().sum(), case.core)


def test_forward_keeps_its_dtype_inside_autocast(make_case: Callable[..., Any]) -> None:
    case = make_case(S=5, out=16, in_=16).to(torch.float32)
    expected = torch.ops.tcurlora.forward(*case.arguments)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = torch.ops.tcurlora.forward(*case.arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_h_takes_no_part_in_gradients(make_case: Callable[..., Any]) -> None:
    case = make_case().training("x", "core")
    y, h = torch.ops.tcurlora.forward(*case.arguments)
    assert y.requires_grad
    assert not h.requires_grad


def test_an_input_changed_before_backward_is_noticed(make_case: Callable[..., Any]) -> None:
    case = make_case().training("x", "core")
    y = torch.ops.tcurlora.linear(*case.arguments)
    with torch.no_grad():
        case.core.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
