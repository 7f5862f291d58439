"""Both forms of the middle product against the dense definition, and the gradients of one against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.maths import folding, reference
from tcurlora_ext.maths.contract import Factors
from tcurlora_ext.maths.grouped import GroupedMiddle
from tcurlora_ext.maths.middle import BatchedMiddle

SCALE, T, C, R = 0.7, 5, 3, 2


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


cases = pytest.mark.parametrize(
    ("slices", "first", "n", "transform"),
    [(5, 1, 3, "dft"), (6, 2, 4, "dct"), (6, 2, 4, "dft")]
    + [(slices, 0, slices, transform) for slices in (1, 2, 3, 4, 8, 12) for transform in ("dft", "dct")],
)


def of_core(core: Tensor, first: int, n: int, transform: str, dtype: torch.dtype = torch.float64) -> GroupedMiddle:
    unused = torch.empty(0)
    return GroupedMiddle(Factors(unused, core, unused, first, n, SCALE, transform), dtype)


@cases
@pytest.mark.parametrize("form", [BatchedMiddle, GroupedMiddle])
def test_between_row_and_col_it_is_the_dense_delta(
    slices: int, first: int, n: int, transform: str, form: type[BatchedMiddle | GroupedMiddle]
) -> None:
    columns, core, rows = double(slices, 6, C), double(slices, C, R), double(slices, R, 7)
    col, row = folding.fold_columns(columns, transform), folding.fold_rows(rows, transform)
    middle = form(Factors(col, folding.fold_core(core, transform), row, first, n, SCALE, transform), col.dtype)
    x = double(T, 7)
    m = middle.forward(x @ row.T)
    if transform == "dft":
        delta = reference.delta_weights(columns, core, rows, SCALE)
    else:
        left = folding.slice_product(columns, core, transform)
        delta = SCALE * folding.slice_product(left, rows, transform)
    expected = torch.einsum("ti,noi->tno", x, delta[first : first + n])
    assert_close(m @ col.T, expected, rtol=1e-12, atol=1e-12)


@cases
def test_backward_and_the_core_gradient_are_those_of_autograd(slices: int, first: int, n: int, transform: str) -> None:
    h, core, p = double(T, R * slices).requires_grad_(), double(slices, C, R).requires_grad_(), double(T, n, C * slices)
    middle = of_core(core, first, n, transform)
    dh, dcore = torch.autograd.grad((middle.forward(h) * p).sum(), (h, core))
    assert_close(middle.backward(middle.by_group(p), p.dtype), dh, rtol=1e-12, atol=1e-12)
    assert_close(middle.core_gradient(middle.by_group(p), h), dcore, rtol=1e-12, atol=1e-12)


def test_results_are_in_the_dtype_of_the_data_and_the_core_gradient_is_wide() -> None:
    core, h, p = torch.randn(4, C, R), torch.randn(T, 4 * R).bfloat16(), torch.randn(T, 2, 4 * C).bfloat16()
    assert of_core(core, 1, 2, "dft", torch.bfloat16).forward(h).dtype == torch.bfloat16
    middle = of_core(core, 1, 2, "dft", torch.float32)
    grouped = middle.by_group(p)
    assert (middle.backward(grouped, p.dtype).dtype, middle.core_gradient(grouped, h).dtype) == (p.dtype, torch.float32)
