"""Whole training jobs: the core changes, the base does not, and saved and merged models compute what was learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur


@pytest.fixture
def task(make_network: Any) -> tuple[Any, Tensor, Tensor]:
    """A base, inputs, and target outputs of a base that an adapter can reproduce."""
    base = make_network()
    target = copy.deepcopy(base)
    tcur.inject(target, tcur.TCURConfig(rank=2))
    for stack in tcur.stacks(target).values():
        stack.set_core_slices(0.3 * torch.randn(stack.core.shape))
    x = torch.randn(16, 5, 6)
    with torch.no_grad():
        return base, x, target(x)


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float = 0.05) -> tuple[float, float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
def test_the_core_moves_in_training_and_the_base_does_not(task: Any, transform: str, domain: str) -> None:
    """In the released code of the method the core is in no optimizer and no forward pass, so that it never learns."""
    model, x, y = task
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    tcur.inject(model, tcur.TCURConfig(rank=2, transform=transform, core_domain=domain))
    before = {name: stack.delta_weights().detach() for name, stack in tcur.stacks(model).items()}
    first, last = fit(model, x, y, 30)
    for name, stack in tcur.stacks(model).items():
        assert float(stack.core.abs().max().detach()) > 0.05, name
        moved = (stack.delta_weights() - before[name]).flatten(1).norm(dim=1)
        assert float(moved.min().detach()) > 0, name  # every slice, not only some
    assert last < 0.7 * first
    for name, value in base.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_every_entry_of_every_core_gets_a_gradient(task: Any) -> None:
    model, x, y = task
    tcur.inject(model, tcur.TCURConfig(rank=2))
    (model(x) - y).square().mean().backward()
    for stack in tcur.stacks(model).values():
        assert stack.core.grad is not None
        assert bool((stack.core.grad != 0).all())


def test_the_core_gradient_is_that_of_the_dense_delta(task: Any) -> None:
    model, x, y = task
    model.double()
    x, y = x.double(), y.double()
    tcur.inject(model, tcur.TCURConfig(rank=2))
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.1 * torch.randn(stack.core.shape))
    cores = {name: stack.core for name, stack in tcur.stacks(model).items()}
    found = torch.autograd.grad((model(x) - y).square().mean(), list(cores.values()))
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, tcur.TCURLinear):
            dense[f"{name}.weight"] = module.weight + module.delta_weight()
    plain = tcur.remove(copy.deepcopy(model))
    output = torch.func.functional_call(plain, dense, (x,))
    right = torch.autograd.grad((output - y).square().mean(), list(cores.values()))
    for a, b in zip(found, right, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_all_three_factors_learn(task: Any) -> None:
    model, x, y = task
    tcur.inject(model, tcur.TCURConfig(rank=2, trainable="all"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    first, last = fit(model, x, y, 30)
    assert last < 0.7 * first
    assert {name.rsplit(".", 1)[-1] for name in before} == {"core", "col", "row"}
    assert all(not torch.equal(model.get_parameter(name), old) for name, old in before.items())


def test_training_with_a_head_saving_loading_and_going_on(task: Any, tmp_path: Path) -> None:
    model, x, y = task
    plain = copy.deepcopy(model)
    tcur.inject(model, tcur.TCURConfig(rank=2))
    tcur.unfreeze(model, ["head", "norm"])
    model.train()
    fit(model, x, y, 5)
    tcur.save_adapter(model, tmp_path)
    other = tcur.load_adapter(plain, tmp_path).train()
    for m in (model, other):
        fit(m, x, y, 5)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_what_is_learned_is_what_is_merged(task: Any) -> None:
    model, x, y = task
    tcur.inject(model, tcur.TCURConfig(rank=2))
    fit(model, x, y, 20)
    with torch.no_grad():
        learned = model(x)
        plain = tcur.remove(tcur.merge(model))
        assert_close(plain(x), learned, rtol=1e-4, atol=1e-5)
        assert float((learned - y).square().mean()) < 1.0


def test_evaluating_first_does_not_stop_training(task: Any) -> None:
    model, x, y = task
    tcur.inject(model, tcur.TCURConfig(rank=2, core_domain="slice"))
    with torch.inference_mode():
        model(x)
    first, last = fit(model, x, y, 10)
    assert last < first


def test_training_is_reproducible_to_the_bit(task: Any) -> None:
    model, x, y = task
    twin = copy.deepcopy(model)
    for m in (model, twin):
        tcur.inject(m, tcur.TCURConfig(rank=2))
        fit(m, x, y, 5)
    for name, stack in tcur.stacks(model).items():
        assert torch.equal(stack.core, tcur.stacks(twin)[name].core)


def test_activation_checkpointing_gives_the_same_gradients(task: Any) -> None:
    model, x, _ = task
    tcur.inject(model, tcur.TCURConfig(rank=2))
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(0.1 * torch.randn(stack.core.shape))
    cores = [stack.core for stack in tcur.stacks(model).values()]
    h = model.embed(x)
    plain = torch.autograd.grad(model.blocks[0](h).square().sum(), cores)
    again = torch.utils.checkpoint.checkpoint(model.blocks[0], h, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), cores), plain, strict=True):
        assert torch.equal(a, b)
