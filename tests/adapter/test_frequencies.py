"""Cores of the lowest frequencies: results, numbers of parameters, and all that works with all frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURLayer
from tcurlora_ext.maths import folding, reference, scale

COUNTS = pytest.mark.parametrize(("slices", "kept"), [(2, 1), (5, 1), (5, 2), (6, 1), (6, 2), (6, 3), (7, 3)])
BACKENDS = pytest.mark.parametrize("backend", ["eager", "native"])


def stack_of(slices: int, kept: int | None, **options: Any) -> tuple[tcur.TCURStack, Tensor]:
    torch.manual_seed(0)
    weights = torch.randn(slices, 6, 7, dtype=torch.float64)
    stack = tcur.TCURStack.from_weights(weights, (3, 2), frequencies=kept, **options)
    stack.set_core_slices(torch.randn(slices, 3, 2, dtype=torch.float64))
    return stack, weights


@COUNTS
def test_the_core_has_the_blocks_of_the_lowest_frequencies(slices: int, kept: int) -> None:
    stack, _ = stack_of(slices, kept)
    assert stack.core.shape == (2 * kept - 1, 3, 2)
    assert (stack.col.shape, stack.row.shape) == ((6, 3 * (2 * kept - 1)), (2 * (2 * kept - 1), 7))
    spectrum = torch.fft.rfft(stack.core_slices().detach(), dim=0)
    assert bool(spectrum[:kept].abs().amax((1, 2)).min() > 1e-3)
    assert float(spectrum[kept:].abs().max()) < 1e-12


@COUNTS
def test_the_change_is_the_definition_on_whole_columns_and_rows(slices: int, kept: int) -> None:
    stack, W = stack_of(slices, kept)
    C, R = W[:, :, stack.columns], W[:, stack.rows]
    expected = reference.delta_weights(C, stack.core_slices().detach(), R, stack.scale)
    assert_close(stack.delta_weights().detach(), expected, rtol=1e-12, atol=1e-12)


@BACKENDS
@COUNTS
def test_every_layer_and_its_gradients_are_those_of_the_dense_delta(slices: int, kept: int, backend: str) -> None:
    """For layers of one slice, and for a fused layer of two."""
    stack, W = stack_of(slices, kept, backend=backend)
    for first, n in [(layer, 1) for layer in range(slices)] + [(slices - 2, 2)]:
        own = slice(first, first + n)
        x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
        weight, bias = W[own].flatten(0, 1), torch.randn(6 * n, dtype=torch.float64)
        y = stack.adapt(x, weight, bias, first, n)
        expected = nn.functional.linear(x, weight + stack.delta_weights()[own].flatten(0, 1), bias)
        assert_close(y, expected, rtol=1e-11, atol=1e-11)
        g = torch.randn_like(y)
        found, wanted = (torch.autograd.grad(out, (x, stack.core), g) for out in (y, expected))
        assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_as_many_frequencies_as_there_are_is_no_choice(slices: int) -> None:
    every, _ = stack_of(slices, slices // 2 + 1)
    none, _ = stack_of(slices, None)
    for name, value in none.state_dict().items():
        assert torch.equal(every.state_dict()[name], value), name


def test_gradcheck() -> None:
    stack, W = stack_of(5, 2)

    def call(x: Tensor, core: Tensor) -> Tensor:
        values = {"core": core}
        return torch.func.functional_call(_Layer(stack, W), {f"stack.{k}": v for k, v in values.items()}, (x,))

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, stack.core.detach().clone().requires_grad_()))


class _Layer(nn.Module):
    def __init__(self, stack: tcur.TCURStack, weights: Tensor) -> None:
        super().__init__()
        self.stack, self.weights = stack, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.adapt(x, self.weights[3:].flatten(0, 1), None, 3, 2)


@COUNTS
def test_a_core_survives_folding_where_it_has_no_more(slices: int, kept: int) -> None:
    blocks = folding.kept_blocks(slices, kept)
    core = torch.randn(blocks, 3, 2, dtype=torch.float64)
    U = folding.unfold_core(core, "dft", slices)
    assert_close(folding.fold_core(U, "dft", blocks), core, rtol=1e-12, atol=1e-12)
    assert U.norm() == pytest.approx(float(core.norm()))  # orthonormal


@COUNTS
def test_step_lengths_are_those_of_signs_on_the_kept_coordinates(slices: int, kept: int) -> None:
    C, R = torch.randn(slices, 6, 3, dtype=torch.float64), torch.randn(slices, 2, 7, dtype=torch.float64)
    blocks = folding.kept_blocks(slices, kept)

    def energy(core: Tensor) -> float:
        U = folding.unfold_core(core, "dft", slices)
        return float(reference.delta_weights(C, U, R, 1.0).square().sum()) / slices

    units = torch.eye(blocks * 6, dtype=torch.float64).view(-1, blocks, 3, 2)
    assert scale.step_length(C, R, frequencies=kept) ** 2 == pytest.approx(sum(map(energy, units)), rel=1e-9)
    # Signs of gradients: of the same order, as these factors are nearly orthogonal.
    ratio = scale.first_step_length(C, R, frequencies=kept) / scale.step_length(C, R, frequencies=kept)
    assert 0.7 < ratio < 2


def test_a_whole_model_learns_and_merges(network: Any, x: Tensor) -> None:
    y = network(x)
    tcur.inject(network, tcur.TCURConfig(rank=2, frequencies=2))
    assert {name: tuple(stack.core.shape) for name, stack in tcur.stacks(network).items()} == {
        "8x8": (3, 2, 2), "16x8": (2, 2, 2), "8x16": (2, 2, 2),
    }  # fmt: skip
    assert_close(network(x), y, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        loss = (network(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = network(x)
    assert_close(tcur.merge(network)(x), trained, rtol=1e-4, atol=1e-5)
    assert all(layer.merged for layer in network.modules() if isinstance(layer, TCURLayer))
