"""The definition against golden vectors that were computed without this package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from tcurlora_ext.maths import reference
from tcurlora_ext.maths.tproduct import tpinv, tprod

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def test_delta_weights_equal_the_golden_ones(golden: dict[str, Tensor]) -> None:
    delta = reference.delta_weights(golden["C"], golden["U"], golden["R"])
    assert_close(delta, golden["delta"], **CLOSE)
    assert_close(reference.delta_weights(golden["C"], golden["U"], golden["R"], -2.5), -2.5 * golden["delta"], **CLOSE)


def test_forward_and_gradients_equal_the_golden_ones(golden: dict[str, Tensor]) -> None:
    """y, dx and dU of every slice, by autograd through the dense definition."""
    W, x = golden["W"], golden["x"].clone().requires_grad_()
    U = golden["U"].clone().requires_grad_()
    zero = torch.zeros_like(W[0])
    y = torch.stack(
        [reference.tcur_linear(x[s], zero, None, golden["C"], U, golden["R"], s, 1, 1.0) for s in range(W.shape[0])]
    )
    assert_close(y, golden["y"], **CLOSE)
    dx, dU = torch.autograd.grad(y, (x, U), golden["g"])
    assert_close(dx, golden["dx"], **CLOSE)
    assert_close(dU, golden["dU"], **CLOSE)


def test_tcur_linear_stacks_slices_by_rows_and_adds_base_and_bias() -> None:
    S, out, n = 4, 3, 2
    C, U, R = (torch.randn(S, *shape, dtype=torch.float64) for shape in ((out, 2), (2, 1), (1, 5)))
    weight, bias = torch.randn(n * out, 5, dtype=torch.float64), torch.randn(n * out, dtype=torch.float64)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    y = reference.tcur_linear(x, weight, bias, C, U, R, 1, n, 0.5)
    delta = 0.5 * tprod(tprod(C, U), R)
    for block in range(n):
        part = slice(block * out, (block + 1) * out)
        expected = x @ (weight[part] + delta[1 + block]).T + bias[part]
        assert_close(y[..., part], expected, **CLOSE)


def test_cur_reconstruction_equals_the_golden_one(golden: dict[str, Tensor]) -> None:
    found = reference.cur_reconstruction(golden["W"], golden["rows"], golden["columns"])
    # The pseudo-inverse multiplies rounding by the condition number of the chosen block.
    assert_close(found, golden["cur_reconstruction"], rtol=1e-8, atol=1e-8)


def test_the_golden_start_core_is_the_pseudo_inverse_of_the_intersection(golden: dict[str, Tensor]) -> None:
    intersection = golden["W"][:, golden["rows"]][:, :, golden["columns"]]
    assert_close(tpinv(intersection), golden["U0"], rtol=1e-8, atol=1e-8)
