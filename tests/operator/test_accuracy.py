"""The accuracy of every backend, for y and every gradient, and that no result depends on uninitialised memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tcurlora_ext.maths import folding

NAMES = ("x", "weight", "bias", "col", "core", "row")

# S, c, r, n, T: pairs and blocks alone, c unlike r, ranks of 1 to 16, tokens that fill no tile and more than one.
SIZES = [(1, 2, 3, 1, 5), (2, 1, 1, 2, 8), (5, 4, 4, 2, 61), (6, 3, 5, 3, 130), (12, 16, 16, 1, 33), (48, 8, 8, 3, 70)]
sizes = pytest.mark.parametrize(("S", "c", "r", "n", "T"), SIZES)
transforms = pytest.mark.parametrize("transform", ["dft", "dct"])


def gradients_of(case: Any, y: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of all six tensors, by name."""
    found = torch.autograd.grad(y, [getattr(case, name) for name in NAMES], g)
    return {"y": y.detach(), **dict(zip(NAMES, found, strict=True))}


def results_of(case: Any, g: Tensor) -> dict[str, Tensor]:
    case = case.training(*NAMES)
    return gradients_of(case, torch.ops.tcurlora.linear(*case.arguments), g)


def definition_of(case: Any, g: Tensor) -> dict[str, Tensor]:
    """The same by the dense definition in float64, with autograd through unfolding to the folded factors."""
    case = case.to(torch.float64, torch.float64).training(*NAMES)
    S = case.core.shape[0]
    C = folding.unfold_columns(case.col, S, case.transform)
    U, R = folding.unfold_core(case.core, case.transform), folding.unfold_rows(case.row, S, case.transform)
    return gradients_of(case, case.replaced(C=C, U=U, R=R).reference(), g.double())


@sizes
@transforms
def test_float64_equals_the_definition_to_1e_12_of_the_largest_entry(
    make_case: Callable[..., Any], S: int, c: int, r: int, n: int, T: int, transform: str
) -> None:
    case = make_case(S, 24, 20, c, r, S - n, n, (T,), scale=0.3, transform=transform, seed=S)
    g = torch.randn(T, n * 24, dtype=torch.float64)
    found, right = results_of(case, g), definition_of(case, g)
    for name, expected in right.items():
        error = (found[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-12, f"{name}: {error:.1e}"


@sizes
@transforms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shorter_dtype_errs_at_most_twice_as_much_as_the_eager_form(
    make_case: Callable[..., Any], S: int, c: int, r: int, n: int, T: int, transform: str, dtype: torch.dtype
) -> None:
    """Errors are those against float64 on the same rounded inputs, in the Frobenius norm, compared with eager's."""
    case = make_case(S, 24, 20, c, r, S - n, n, (T,), scale=0.02, transform=transform, seed=S).to(dtype)
    g = torch.randn(T, n * 24).to(dtype)
    right = definition_of(case, g)
    found, eager = results_of(case, g), results_of(case.replaced(backend="eager"), g)
    for name, expected in right.items():
        assert found[name].dtype == eager[name].dtype
        ours, theirs = ((result[name].double() - expected).norm() / expected.norm() for result in (found, eager))
        # One eps (two roundings) is added: for a core of 2 or 6 elements, eager may be exact by chance, and the order
        # of sums depends on the CPU and its threads.
        slack = torch.finfo(found[name].dtype).eps
        assert ours <= 2 * theirs + slack, f"{name}: {ours:.1e}, eager {theirs:.1e}"


@pytest.fixture
def poisoning() -> Iterator[Callable[[bool], None]]:
    """Switches whether torch.empty is filled with NaN."""
    settings: Any = torch.utils.deterministic
    kept = settings.fill_uninitialized_memory

    def switch(on: bool) -> None:
        settings.fill_uninitialized_memory = on
        torch.use_deterministic_algorithms(on)

    yield switch
    torch.use_deterministic_algorithms(False)
    settings.fill_uninitialized_memory = kept


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_lay_in_memory_before_changes_no_bit(
    make_case: Callable[..., Any],
    poisoning: Callable[[bool], None],
    S: int,
    c: int,
    r: int,
    n: int,
    T: int,
    dtype: torch.dtype,
) -> None:
    case = make_case(S, 24, 20, c, r, S - n, n, (T,), seed=S).to(dtype, torch.promote_types(dtype, torch.float32))
    g = torch.randn(T, n * 24).to(dtype)
    clean = results_of(case, g)
    poisoning(True)
    assert torch.empty(3).isnan().all()  # or the test could not tell
    poisoned = results_of(case, g)
    for name, expected in clean.items():
        assert torch.equal(poisoned[name], expected), name


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_call_twice_gives_the_same_bits(
    make_case: Callable[..., Any], S: int, c: int, r: int, n: int, T: int, dtype: torch.dtype
) -> None:
    case = make_case(S, 24, 20, c, r, S - n, n, (T,), seed=S).to(dtype, torch.promote_types(dtype, torch.float32))
    g = torch.randn(T, n * 24).to(dtype)
    first, second = results_of(case, g), results_of(case, g)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name
