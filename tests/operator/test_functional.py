"""The functional form: wrong input gives one error that names the tensor, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.operator.functional import tcur_delta, tcur_linear


def call(case: Any, backend: str | None = None) -> Tensor:
    return tcur_linear(*case.tensors, case.first_slice, case.num_slices, case.scale, backend=backend or case.backend)


# S=5, out=6, in=7, c=3, r=2: what the defaults of the case are.
WRONG_SHAPES = [
    ("x", (4, 6), r"x has shape \(4, 6\), expected \(4, 7\)"),
    ("x", (), "x has shape"),
    ("weight", (7, 6), r"weight has shape \(7, 6\), expected \(6, 7\)"),
    ("weight", (42,), r"weight \(42,\).*expected two dimensions"),
    ("bias", (7,), r"bias has shape \(7,\), expected \(6,\)"),
    ("bias", (1,), r"bias has shape \(1,\)"),  # would broadcast
    ("bias", (4, 6), r"bias has shape \(4, 6\)"),  # would broadcast
    ("col", (6, 14), r"col has shape \(6, 14\), expected \(6, 15\)"),
    ("col", (1, 15), "has shape"),
    ("row", (9, 7), r"row has shape \(9, 7\), expected \(10, 7\)"),
    ("core", (4, 3, 2), "has shape"),
    ("core", (5, 2, 2), "has shape"),
    ("core", (15, 2), r"core \(15, 2\).*three for the core"),
]


@pytest.mark.parametrize(("name", "shape", "message"), WRONG_SHAPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_wrong_shape_is_named(
    make_case: Callable[..., Any], name: str, shape: tuple[int, ...], message: str, device: str
) -> None:
    case = make_case().replaced(**{name: torch.zeros(shape, dtype=torch.float64)})
    if device == "meta":  # the shape-only form refuses the same
        case = case.replaced(**{n: getattr(case, n).to("meta") for n in ("x", "weight", "bias", "col", "core", "row")})
    with pytest.raises(ValueError, match=message):
        call(case)


@pytest.mark.parametrize("name", ["weight", "bias", "col", "row"])
def test_a_wrong_dtype_is_named(make_case: Callable[..., Any], name: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=f"{name} is torch.float32, expected torch.float64 as x"):
        call(case.replaced(**{name: getattr(case, name).float()}))


@pytest.mark.parametrize("core", [torch.int64, torch.complex128])
def test_a_core_that_is_not_real_is_refused(make_case: Callable[..., Any], core: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"core is {core}"):
        call(make_case().replaced(core=torch.zeros(5, 3, 2, dtype=core)))


def test_integers_are_refused(make_case: Callable[..., Any]) -> None:
    case = make_case()
    whole = {name: getattr(case, name).long() for name in ("x", "weight", "bias", "col", "row")}
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        call(case.replaced(**whole))


@pytest.mark.parametrize("name", ["weight", "bias", "col", "row", "core"])
def test_a_wrong_device_is_named(make_case: Callable[..., Any], name: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=f"{name} is on meta, expected {case.x.device} as x"):
        call(case.replaced(**{name: getattr(case, name).to("meta")}))


@pytest.mark.parametrize(("first", "n"), [(5, 1), (4, 2), (-1, 1), (0, 6)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_slices_outside_the_stack_are_refused(make_case: Callable[..., Any], first: int, n: int, device: str) -> None:
    case = make_case(n=max(n, 1)).replaced(first_slice=first, num_slices=n)
    if device == "meta":
        case = case.replaced(**{k: getattr(case, k).to("meta") for k in ("x", "weight", "bias", "col", "core", "row")})
    with pytest.raises(ValueError, match=rf"slices {first}\.\.{first + n - 1} asked for, the core has 0\.\.4"):
        call(case)


def test_no_slices_at_all_are_refused(make_case: Callable[..., Any]) -> None:
    case = make_case().replaced(num_slices=0, weight=torch.zeros(0, 7, dtype=torch.float64), bias=None)
    with pytest.raises(ValueError, match="slices"):
        call(case)


def test_an_unknown_backend_or_transform_is_named(make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"backend 'cuda' is unknown.*eager"):
        call(case, backend="cuda")
    with pytest.raises(ValueError, match="transform 'fft'"):
        tcur_linear(*case.tensors, 0, 1, 1.0, transform="fft")


def test_eager_and_auto_agree(make_case: Callable[..., Any]) -> None:
    case = make_case().training("core")
    auto, eager = call(case), call(case, backend="eager")
    torch.testing.assert_close(auto, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("slices", "transform"), [(1, "dft"), (2, "dft"), (5, "dft"), (6, "dft"), (4, "dct")])
def test_the_adapter_alone_is_what_the_operator_adds(slices: int, transform: str) -> None:
    n, out, in_, c, r = min(2, slices), 4, 5, 3, 2
    shapes = ((2, 3, in_), (out, c * slices), (slices, c, r), (r * slices, in_))
    x, col, core, row = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    first = slices - n
    zero = torch.zeros(n * out, in_, dtype=torch.float64)
    expected = tcur_linear(x, zero, None, col, core, row, first, n, 0.7, "eager", transform)
    assert_close(tcur_delta(x, col, core, row, first, n, 0.7, transform), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: tcur_delta(*t, first, n, 0.7, transform), (x, col, core, row))


def test_the_adapter_alone_makes_no_matrix_of_the_weights_size(largest_new: Callable[..., Any]) -> None:
    shapes = ((3, 256), (256, 2), (1, 2, 2), (2, 256))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with largest_new(*tensors) as watch:
        tcur_delta(*tensors, 0, 1, 1.0).sum().backward()
    assert watch.largest == 3 * 256


def test_the_adapter_alone_refuses_slices_that_the_core_has_not() -> None:
    x, col, core, row = torch.randn(3, 5), torch.randn(4, 4), torch.randn(2, 2, 2), torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"slices 1\.\.2 asked for, the core has 0\.\.1"):
        tcur_delta(x, col, core, row, 1, 2, 1.0)
