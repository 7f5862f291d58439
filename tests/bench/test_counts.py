"""Counts: FLOPs and bytes of one layer in closed form, and what autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tcurlora_ext.bench.cases import Case, Layer, of_layer
from tcurlora_ext.bench.counts import fewest_bytes, flops
from tcurlora_ext.bench.memory import forward_pass, observe
from tcurlora_ext.bench.networks import Network, Run
from tcurlora_ext.bench.variants import Problem, variants

CPU = torch.device("cpu")
Make = Callable[..., Problem]
T, n, m, k, q = 32, 3, 16, 24, 24  # of the case in conftest.py; q = 2 x 12
BASE = 2 * T * n * m * k
WIDE = 2 * T * q * (k + n * m)  # x A^T and its B, or x row^T and m col^T


def saved(problem: Problem) -> int:
    return sum(forward_pass(problem).saved.values())


def fewest(problem: Problem) -> int:
    return fewest_bytes(problem, forward_pass(problem))


def test_flops_of_the_frozen_layer_and_of_lora(problem: Make, case: Case) -> None:
    inference = replace(case, mode="inference")
    assert flops(problem("frozen")) == 2 * BASE  # forward, and dx
    assert flops(problem("lora")) == flops(problem("lora adapter first")) == 2 * BASE + 3 * WIDE
    assert flops(problem("frozen", inference)) == BASE
    assert flops(problem("lora", inference)) == BASE + WIDE


def test_flops_of_tcur_are_the_wide_products_and_the_middle(problem: Make) -> None:
    middle = 2 * T * n * 2 * 2 * (2 + 4 * 5)  # S = 12: two frequencies alone, five pairs of four blocks
    assert flops(problem("tcur native")) == flops(problem("tcur eager")) == 2 * BASE + 2 * WIDE + 3 * middle


def test_flops_of_attention_fused_on_a_cpu() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    shape = (1, 2, 64, 16)  # a batch of one, two heads, 64 tokens, 16 features
    run = Run((torch.randn(shape, requires_grad=True),), (torch.randn(shape),))
    case, module = Case("attention", "encoder", 64), Attention()
    attention = Problem(variants(CPU)[0], case, Network(module, [run], [], {}), module, module)
    product = 2 * 2 * 64 * 64 * 16
    assert flops(attention) == 2 * product + 5 * product  # q k^T and its v; again q k^T and four gradients


def test_building_dw_costs_the_same_for_any_number_of_tokens(problem: Make, layer: Layer) -> None:
    """col B_l row in the forward pass; g^T x and its way back to the core in the backward pass."""
    once = flops(problem("tcur dense layer"))
    twice = flops(problem("tcur dense layer", of_layer(layer, 2 * T, rank=2, compiled=False)))
    assert twice - once == 3 * BASE  # forward, dx and the whole dW
    assert once - 3 * BASE >= 2 * 2 * q * n * m * k


def test_saved_bytes_are_x_and_its_projection_for_lora_and_h_for_tcur(problem: Make, case: Case) -> None:
    assert saved(problem("frozen")) == 0
    assert saved(problem("lora")) == 4 * T * (k + q)
    assert saved(problem("tcur native")) == saved(problem("tcur eager")) == 4 * T * q
    assert saved(problem("tcur transient")) >= 4 * T * k
    wide = of_layer(Layer("wide", 8, 16, 1, 12), T, rank=2, compiled=False)
    assert saved(problem("tcur native", wide)) == 4 * T * 8  # q = 24: x instead of h
    assert saved(problem("lora", replace(case, mode="inference"))) == 0


def test_fewest_bytes_of_a_layer(problem: Make, case: Case) -> None:
    weights, x, y, factors = n * m * (k + 1), T * k, T * n * m, q * (k + n * m)
    assert fewest(problem("frozen", replace(case, mode="inference"))) == 4 * (weights + x + y)
    assert fewest(problem("frozen")) == 4 * (2 * weights + 2 * x + 2 * y)
    # x is there already, so it is only read again; x A^T is written and read; A and B have gradients.
    assert fewest(problem("lora")) == 4 * (2 * (weights + factors) + 3 * x + 2 * y + 2 * T * q + factors)


def test_the_peak_is_what_is_held_at_once() -> None:
    def step() -> None:
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        torch.empty_like(b)

    assert observe(step, CPU).peak == 16000


def test_launches_are_what_computes() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    assert observe(lambda: a @ b.T, CPU).launches == 1
    assert observe(lambda: (a @ b).exp().view(-1), CPU).launches == 2
    assert observe(lambda: a.T.reshape(-1), CPU).launches == 1  # a copy
    assert observe(lambda: a.T.flatten(0, 0), CPU).launches == 0


def test_launches_of_a_step(problem: Make) -> None:
    """The frozen layer: one product forward, one backward. native: at most five stages forward and four backward."""
    frozen, native, eager = (
        observe(problem(name).step, CPU).launches for name in ("frozen", "tcur native", "tcur eager")
    )
    assert frozen == 2
    assert 7 <= native < 20 < eager


@pytest.mark.parametrize("name", ["lora", "tcur native", "tcur dense layer"])
def test_a_step_leaves_nothing_behind(problem: Make, name: str) -> None:
    adapted = problem(name)
    adapted.step()
    once = observe(adapted.step, CPU).peak
    adapted.step()
    assert observe(adapted.step, CPU).peak == once > 0
    assert all(p.grad is None for p in adapted.trained)
