"""Dropout on the adapter's input: in training only, and never on the base's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur

TRANSFORMS = pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
P = 0.4


def layer_of(transform: str = "dft", dropout: float = P, **options: Any) -> tcur.TCURLinear:
    """Three slices of 8 x 10, float64, with a core that changes the output."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 24, dtype=torch.float64)
    layer = tcur.TCURLinear.from_linear(linear, (3, 2), 3, transform=transform, dropout=dropout, **options)
    layer.stack.set_core_slices(torch.randn(3, 3, 2))
    return layer


@TRANSFORMS
def test_the_base_sees_x_and_the_adapter_the_dropped_x(transform: str) -> None:
    layer, x = layer_of(transform), torch.randn(5, 7, 10, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, P)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + nn.functional.linear(dropped, layer.delta_weight())
    assert bool((dropped == 0).any())
    assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.stack.core), g)
    assert_close(found, torch.autograd.grad(expected, (x, layer.stack.core), g), rtol=1e-11, atol=1e-11)


def test_a_zero_core_gives_the_base_bit_for_bit() -> None:
    layer, x = layer_of(), torch.randn(5, 10, dtype=torch.float64)
    nn.init.zeros_(layer.stack.core)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@TRANSFORMS
def test_the_mean_over_masks_is_the_output_without_dropout(transform: str) -> None:
    layer, x = layer_of(transform), torch.randn(10, dtype=torch.float64)
    torch.manual_seed(1)
    draws = layer(x.expand(20000, 10))
    exact = layer.eval()(x)
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - exact).abs() < 5 * error).all())
    assert bool((draws.std(0) > 0.1 * (exact - nn.functional.linear(x, layer.weight, layer.bias)).abs()).all())


@TRANSFORMS
def test_evaluation_is_that_of_no_dropout(transform: str) -> None:
    x = torch.randn(5, 10, dtype=torch.float64)
    assert torch.equal(layer_of(transform).eval()(x), layer_of(transform, dropout=0.0)(x))


def test_a_layer_in_evaluation_drops_nothing_though_the_model_trains(network: Any, x: Tensor, train: Any) -> None:
    train(tcur.inject(network, tcur.TCURConfig(rank=2, dropout=0.5))).eval()
    y = network(x)
    assert torch.equal(network(x), y)
    network.blocks[0].mlp.linear1.train()
    assert not torch.equal(network(x), y)
    network.train()
    network.blocks.eval()
    network.norm.eval()
    assert torch.equal(network(x), y)


def test_gradients_through_a_mask() -> None:
    layer = layer_of("dft")

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same mask at every call
        return layer(x)

    assert torch.autograd.gradcheck(call, torch.randn(3, 10, dtype=torch.float64, requires_grad=True))


def test_autocast_and_half_precision_give_their_dtype() -> None:
    layer = tcur.TCURLinear(16, 8, rank=2, dropout=0.5)
    layer.stack.set_core_slices(torch.randn(1, 2, 2))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x.bfloat16() if layer.bfloat16() else x).float().sum().backward()
    assert layer.stack.core.grad is not None
    assert layer.stack.core.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"frequencies": 1}, {"trainable": "all"}])
def test_a_compiled_layer_draws_and_computes_the_same(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (layer, compiled):
        torch.manual_seed(3)
        y = call(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.stack.core))))
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
