"""The riding operators: the definition, gradients, accuracy, and what PyTorch asks of an operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tcurlora_ext.maths.contract import Riding
from tcurlora_ext.operator import flops
from tcurlora_ext.operator.riding import decomposition

TRAINED = ("x", "bias", "core", "row")
RIDE_TRAINED = ("x", "core", "row")
# S, c, r, in, out, leading dimensions
SIZES = [
    (1, 2, 3, 20, 24, (5,)), (1, 1, 1, 7, 5, (3, 2)), (3, 8, 8, 40, 16, (61,)), (2, 4, 7, 33, 12, (2, 65)),
    (1, 16, 16, 64, 64, (130,)), (1, 32, 24, 40, 36, (200,)), (1, 3, 2, 9, 8, ()), (1, 3, 2, 9, 8, (0,)),
]  # fmt: skip
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@dataclass(frozen=True)
class Case:
    """The arguments of ``torch.ops.tcurlora.riding``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    columns: Tensor
    core: Tensor
    row: Tensor
    gain: Tensor
    at: int
    scale: float
    backend: str

    @property
    def adapter(self) -> tuple[Any, ...]:
        return self.columns, self.core, self.row, self.gain, self.at, self.scale

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.bias, *self.adapter, self.backend

    def to(self, dtype: torch.dtype, core: torch.dtype = torch.float32) -> Case:
        cast = {
            name: None if (t := getattr(self, name)) is None else t.to(dtype) for name in ("x", "weight", "bias", "row")
        }
        return replace(self, core=self.core.to(core), gain=self.gain.to(core), **cast)

    def training(self, *names: str) -> Case:
        return replace(self, **{n: getattr(self, n).detach().clone().requires_grad_() for n in names})

    def y(self) -> Tensor:
        return torch.ops.tcurlora.riding(*self.arguments)

    def changed(self) -> Tensor:
        return torch.ops.tcurlora.ride(self.x, *self.adapter, self.backend)

    def definition(self) -> Tensor:
        """y by the dense change of the weight: W + scale * W[:, J] diag(gain) U R, in float64."""
        adapter = Riding(*self.adapter)
        weight, core, row = self.weight.double(), adapter.own_core.double(), adapter.own_row.double()
        delta = self.scale * (weight[:, self.columns] * self.gain.double()) @ core @ row
        return nn.functional.linear(self.x.double(), weight + delta, None if self.bias is None else self.bias.double())


@pytest.fixture(scope="session")
def make(backend: str) -> Callable[..., Case]:
    def build(size: Any = SIZES[0], *, bias: bool = True, scale: float = 0.7, seed: int = 0) -> Case:
        S, c, r, in_, out, leading = size
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        columns = torch.randperm(in_, generator=generator)[:c]
        gain = random(c).abs() + 0.5
        return Case(
            random(*leading, in_), random(out, in_), random(out) if bias else None, columns, random(S, c, r),
            random(S * r, in_) / in_**0.5, gain, S - 1, scale, backend,
        )  # fmt: skip

    return build


def results(case: Case, g: Tensor, y: Callable[[Case], Tensor] = Case.y) -> dict[str, Tensor]:
    names = [name for name in TRAINED if getattr(case, name) is not None]
    case = case.training(*names)
    found = y(case)
    return {
        "y": found.detach(),
        **dict(zip(names, torch.autograd.grad(found, [getattr(case, n) for n in names], g), strict=True)),
    }


@sizes
@pytest.mark.parametrize("bias", [True, False])
def test_float64_is_the_definition(make: Callable[..., Case], size: Any, bias: bool) -> None:
    case = make(size, bias=bias)
    g = torch.randn(*size[-1], size[4], dtype=torch.float64)
    found, right = results(case, g), results(case, g, Case.definition)
    for name, expected in right.items():
        assert_close(
            found[name],
            expected,
            rtol=1e-12,
            atol=1e-12 * max(1.0, float(expected.abs().amax()) if expected.numel() else 1.0),
        )


@sizes
def test_the_changed_input_gives_the_same_through_any_base(make: Callable[..., Case], size: Any) -> None:
    case = make(size)
    g = torch.randn(*size[-1], size[4], dtype=torch.float64)
    by_input = results(case, g, lambda one: nn.functional.linear(one.changed(), one.weight, one.bias))
    for name, expected in results(case, g, Case.definition).items():
        assert_close(by_input[name], expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("size", SIZES[:6], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_shorter_dtype_errs_at_most_twice_as_much_as_the_eager_form(
    make: Callable[..., Case], size: Any, dtype: torch.dtype
) -> None:
    case = make(size, scale=0.1).to(dtype)
    g = torch.randn(*size[-1], size[4]).to(dtype)
    right = results(case.to(torch.float64, torch.float64), g.double(), Case.definition)
    found, eager = results(case, g), results(replace(case, backend="eager"), g)
    for name, expected in right.items():
        assert found[name].dtype == eager[name].dtype
        ours, theirs = ((one[name].double() - expected).norm() / expected.norm() for one in (found, eager))
        slack = torch.finfo(found[name].dtype).eps
        assert ours <= 2 * theirs + slack, f"{name}: {ours:.1e}, eager {theirs:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@sizes
def test_a_zero_core_is_the_base_bit_for_bit(make: Callable[..., Case], size: Any, dtype: torch.dtype) -> None:
    case = make(size).to(dtype, torch.promote_types(dtype, torch.float32))
    case = replace(case, core=torch.zeros_like(case.core))
    assert torch.equal(case.y(), nn.functional.linear(case.x, case.weight, case.bias))
    assert torch.equal(case.changed(), case.x)


def test_gradcheck(make: Callable[..., Case]) -> None:
    case = make((2, 3, 2, 7, 5, (2, 3)))

    def y(x: Tensor, bias: Tensor, core: Tensor, row: Tensor) -> Tensor:
        return replace(case, x=x, bias=bias, core=core, row=row).y()

    def changed(x: Tensor, core: Tensor, row: Tensor) -> Tensor:
        return replace(case, x=x, core=core, row=row).changed()

    trained = case.training(*TRAINED)
    assert torch.autograd.gradcheck(y, [getattr(trained, n) for n in TRAINED])
    assert torch.autograd.gradcheck(changed, [getattr(trained, n) for n in RIDE_TRAINED])


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_a_gradient_alone_is_the_same_as_with_the_others(make: Callable[..., Case], size: Any) -> None:
    """In particular the core's where x needs none: only the chosen features of g W are then computed."""
    case = make(size)
    g = torch.randn(*size[-1], size[4], dtype=torch.float64)
    every = results(case, g)
    for name in TRAINED:
        alone = case.training(name)
        (found,) = torch.autograd.grad(alone.y(), [getattr(alone, name)], g)
        assert_close(found, every[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(make: Callable[..., Case], size: Any, dtype: torch.dtype) -> None:
    case = make(size).to(dtype).training("x", "core")
    near = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    for operator in (torch.ops.tcurlora.riding, torch.ops.tcurlora.riding_forward):
        torch.library.opcheck(operator.default, case.arguments, **near)
    for operator in (torch.ops.tcurlora.ride, torch.ops.tcurlora.ride_forward):
        torch.library.opcheck(operator.default, (case.x, *case.adapter, case.backend), **near)


@sizes
def test_the_fakes_agree_with_the_real_operators(make: Callable[..., Case], size: Any) -> None:
    case = make(size).to(torch.float32)
    ops = torch.ops.tcurlora

    def meta(arguments: Any) -> list[Any]:
        return [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]

    def seen(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
        return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]

    y, h = ops.riding_forward(*case.arguments)
    assert seen(ops.riding_forward(*meta(case.arguments))) == seen((y, h))
    ride = (case.x, *case.adapter, case.backend)
    assert seen(ops.ride_forward(*meta(ride))) == seen(ops.ride_forward(*ride))
    for needs in itertools.product([True, False], repeat=4):
        given = (torch.randn_like(y), case.x, h, case.weight, *case.adapter, list(needs), case.backend)
        assert seen(ops.riding_backward(*meta(given))) == seen(ops.riding_backward(*given)), needs
        given = (torch.randn_like(case.x), case.x, h, *case.adapter, list(needs[1:]), case.backend)
        assert seen(ops.ride_backward(*meta(given))) == seen(ops.ride_backward(*given)), needs


@pytest.mark.parametrize("through", [Case.y, Case.changed])
def test_only_h_is_kept_for_the_core(make: Callable[..., Case], through: Callable[[Case], Tensor]) -> None:
    case = make(SIZES[2])
    for names, largest in ((("core",), h_of(case)), (("x", "core"), h_of(case)), (("row",), case.x.numel())):
        kept: list[Tensor] = []
        trained = case.training(*names)
        own = {t.data_ptr() for t in trained.arguments if isinstance(t, Tensor)} - {trained.x.data_ptr()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            through(trained)
        assert max(t.numel() for t in kept if t.data_ptr() not in own) == largest


def h_of(case: Case) -> int:
    return case.x[..., 0].numel() * case.core.shape[2]


def test_autocast_is_that_of_a_linear_layer(make: Callable[..., Case]) -> None:
    device = torch.get_default_device().type
    case = make(SIZES[2]).to(torch.float32).training("x", "core")
    with torch.autocast(device, torch.bfloat16):
        y, changed = case.y(), case.changed()
    assert (y.dtype, changed.dtype) == (torch.bfloat16,) * 2
    low = replace(case.to(torch.bfloat16), core=case.core, gain=case.gain)
    assert torch.equal(y, low.y())
    y.float().square().sum().backward()
    assert case.core.grad is not None
    assert case.core.grad.dtype == torch.float32


def test_compiled_whole(make: Callable[..., Case]) -> None:
    case = make(SIZES[2]).to(torch.float32)
    torch._dynamo.reset()
    step = torch.compile(Case.y, fullgraph=True, backend="aot_eager")
    g = torch.randn(61, 16)
    assert_close(results(case, g, step), results(case, g))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(make: Callable[..., Case], reentrant: bool) -> None:
    case = make(SIZES[3])
    g = torch.randn(2, 65, 12, dtype=torch.float64)

    trained = case.training(*TRAINED)
    checkpoint(lambda x: replace(trained, x=x).y(), trained.x, use_reentrant=reentrant).backward(g)
    expected = results(case, g)
    for name in TRAINED:
        assert torch.equal(getattr(trained, name).grad, expected[name])


def test_torch_func(make: Callable[..., Case]) -> None:
    case = make(SIZES[2])
    batch = torch.stack([case.core, -case.core])
    for through in (Case.y, Case.changed):
        found = vmap(lambda core, through=through: through(replace(case, core=core)))(batch)
        assert_close(found, torch.stack([through(replace(case, core=core)) for core in batch]))
        trained = case.training("core")
        through(trained).square().sum().backward()
        by_func = grad(lambda core, through=through: through(replace(case, core=core)).square().sum())(case.core)
        assert_close(by_func, trained.core.grad)


def test_a_second_derivative_is_refused(make: Callable[..., Case]) -> None:
    case = make(SIZES[0]).training("x", "core")
    for through in (Case.y, Case.changed):
        (first,) = torch.autograd.grad(through(case).square().sum(), case.x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative is not implemented"):
            first.sum().backward()


def test_an_output_may_be_changed_in_place(make: Callable[..., Case]) -> None:
    case = make(SIZES[3]).training("x", "core")
    nn.functional.relu(case.y(), inplace=True).sum().backward()
    nn.functional.relu(case.changed(), inplace=True).sum().backward()


def test_strides_do_not_matter(make: Callable[..., Case]) -> None:
    case = make(SIZES[2])
    g = torch.randn(61, 16, dtype=torch.float64)
    turned = replace(
        case, x=case.x.T.contiguous().T, weight=case.weight.T.contiguous().T,
        core=case.core.transpose(1, 2).contiguous().transpose(1, 2), row=case.row.T.contiguous().T,
        columns=torch.stack([case.columns] * 2, 1)[:, 0], gain=torch.stack([case.gain] * 2, 1)[:, 0],
    )  # fmt: skip
    found = results(turned, g.T.contiguous().T)
    for name, expected in results(case, g).items():
        assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills torch.empty with NaN."""
    settings: Any = torch.utils.deterministic
    kept = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = True
    # On a GPU cuBLAS asks for a workspace setting before it promises the same bits: a warning is enough here.
    torch.use_deterministic_algorithms(True, warn_only=torch.get_default_device().type == "cuda")
    yield
    torch.use_deterministic_algorithms(False)
    settings.fill_uninitialized_memory = kept


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_again_whatever_lay_in_memory(
    make: Callable[..., Case], request: pytest.FixtureRequest, size: Any, dtype: torch.dtype
) -> None:
    case = make(size).to(dtype, torch.promote_types(dtype, torch.float32))
    g = torch.randn(*size[-1], size[4]).to(dtype)
    first = results(case, g)
    request.getfixturevalue("poisoned")
    for name, found in results(case, g).items():
        assert torch.equal(found, first[name]), name


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="threads of the CPU")
def test_the_number_of_threads_does_not_change_the_sums(make: Callable[..., Case]) -> None:
    case = make((1, 8, 8, 16, 8, (5000,)))
    h, d = torch.randn(5000, 8, dtype=torch.float64), torch.randn(5000, 16, dtype=torch.float64)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(torch.ops.tcurlora.ride_backward(d, None, h, *case.adapter, [False, True, False], case.backend)[1])
    torch.set_num_threads(threads)
    if case.backend == "native":
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


WRONG = [
    ({"x": torch.zeros(4, 19)}, r"x has shape \(4, 19\), expected \(4, 20\)"),
    ({"weight": torch.zeros(24, 21)}, r"weight has shape \(24, 21\), expected \(24, 20\)"),
    ({"bias": torch.zeros(23)}, r"bias has shape \(23,\), expected \(24,\)"),
    ({"columns": torch.zeros(3, dtype=torch.int64)}, r"columns has shape \(3,\), expected \(2,\)"),
    ({"row": torch.zeros(4, 20)}, r"row has shape \(4, 20\), expected \(3, 20\)"),
    ({"gain": torch.zeros(3)}, r"gain has shape \(3,\), expected \(2,\)"),
    ({"core": torch.zeros(2, 3)}, r"core \(2, 3\).*expected 3, 2, 1 and 2 dimensions"),
    ({"row": torch.zeros(3, 20, dtype=torch.float64)}, "row is torch.float64, expected torch.float32 as x"),
    ({"gain": torch.zeros(2, dtype=torch.float64)}, "gain is torch.float64, expected torch.float32 as core"),
    ({"at": 1}, r"slice 1 asked for, the core has 0\.\.0"),
    ({"weight": torch.zeros(24, 20, requires_grad=True)}, "weight requires a gradient: the riding form is for"),
    ({"x": torch.zeros(4, 20, dtype=torch.int64)}, "x is torch.int64, expected a floating dtype"),
    ({"backend": "numpy"}, "backend 'numpy' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arguments_are_named(make: Callable[..., Case], wrong: dict[str, Any], message: str) -> None:
    device = torch.get_default_device()
    moved = {
        n: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for n, t in wrong.items()
    }
    case = replace(make(SIZES[0]).to(torch.float32), **moved)
    with pytest.raises(ValueError, match=message):
        case.y()


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="a GPU's kernels do not read indices on the host")
def test_a_column_out_of_range_is_an_error(make: Callable[..., Case]) -> None:
    case = make(SIZES[0])
    for column in (20, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds)"):
            replace(case, columns=torch.tensor([0, column])).changed()


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_flops_are_those_of_the_products(make: Callable[..., Case], size: Any) -> None:
    """Against the counter's own count of the form in PyTorch operations."""
    flops.register()
    case = make(size).training("x", "core", "row")
    g = torch.randn(*size[-1], size[4], dtype=torch.float64)

    def counted(y: Callable[[Case], Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y(case), [case.x, case.core, case.row], g)
        return counter.get_total_flops()

    assert counted(Case.y) == counted(lambda one: decomposition.riding(*one.arguments))
