"""Training adapters of a bank: together as apart, and through activation checkpointing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tcurlora_ext as tcur

from .models import BOTH, cores_for, filled, make, one_by_one

EXACT = {"rtol": 1e-12, "atol": 1e-12}
both = pytest.mark.parametrize("form", BOTH)
SIX = [str(at) for at in range(6)]


def batches(steps: int, adapters: int) -> list[tuple[list[int], Tensor, Tensor]]:
    """Which adapters are in each step, (adapters,), and the samples and targets of each adapter."""
    torch.manual_seed(3)
    present = [torch.randperm(adapters)[: 2 + step % 4].tolist() for step in range(steps)]
    data = torch.randn(2, steps, adapters, 4, 8, dtype=torch.float64)
    return list(zip(present, *data, strict=True))


@both
@pytest.mark.parametrize("pool", [None, "cpu"])
def test_six_trained_together_equal_six_trained_apart(form: str, pool: str | None) -> None:
    """Adam's momentum too: an adapter that is not in a batch gets no gradient and no step."""
    model = make(form)
    bank = filled(model, 6, pool=pool, capacity=None if pool is None else 6)
    optimizer = torch.optim.AdamW(bank.train(SIX), lr=1e-2)
    for present, x, target in batches(8, 6):
        y = model(x[present], adapter_ids=[str(at) for at in present])
        optimizer.zero_grad()
        (y - target[present]).square().sum().backward()
        for at in range(6):
            grads = [parameter.grad for parameter in bank.parameters_of(str(at)).values()]
            assert all((grad is None) == (at not in present) for grad in grads)
        optimizer.step()
    for at in range(6):
        alone = make(form)
        stacks = tcur.stacks(alone)
        for name, core in cores_for(model, at).items():
            stacks[name].core.data.copy_(core)
        optimizer = torch.optim.AdamW([stack.core for stack in stacks.values()], lr=1e-2)
        for present, x, target in batches(8, 6):
            if at in present:
                optimizer.zero_grad()
                (alone(x[at : at + 1]) - target[at : at + 1]).square().sum().backward()
                optimizer.step()
        for name, core in bank.cores(str(at)).items():
            assert_close(core, stacks[name].core.detach(), **EXACT)
            assert (core != cores_for(model, at)[name]).any()


@both
def test_several_steps_within_one_block_use_the_newest_cores(form: str) -> None:
    model = make(form)
    bank = filled(model, 2)
    optimizer = torch.optim.SGD(bank.train(["0"]), lr=0.01)
    x, found = torch.randn(2, 5, 8, dtype=torch.float64), []
    with bank.use(["0", "1"]):
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        with torch.no_grad():
            last = model(x)
    assert found[2] < found[1] < found[0]
    assert_close(last, model(x, adapter_ids=["0", "1"]).detach(), **EXACT)


@both
def test_an_adapter_may_be_replaced_or_end_training(form: str) -> None:
    model = make(form)
    bank = filled(model, 4, capacity=2, pool="cpu")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    parameters = bank.train(["1"])
    bank.replace("1", cores_for(model, 9))
    assert bank.train(["1"]) == parameters
    assert_close(model(x, adapter_ids=["1", "0"]), one_by_one(model, [9, 0], x), **EXACT)
    model(x, adapter_ids=["1", "2"]).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    with torch.no_grad():
        for parameter, core in zip(parameters, cores_for(model, 8).values(), strict=True):
            parameter.copy_(core)
    assert bank.train(["1"], mode=False) == []
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()  # it is not the bank's any more
    for order in ([2, 3], [0, 2]):
        model(x, adapter_ids=[str(at) for at in order])
    assert_close(model(x, adapter_ids=["1", "3"]), one_by_one(model, [8, 3], x), **EXACT)
    assert not model(x, adapter_ids=["1", "3"]).requires_grad
    bank.train(["0", "2"])
    with pytest.raises(ValueError, match="no room on the device"), _impatient():
        model(x, adapter_ids=["3", "3"])


class _impatient:
    """Let the bank wait shortly for room."""

    def __enter__(self) -> None:
        from tcurlora_ext.adapter.bank import holding

        self.module, self.before = holding, holding.PATIENCE
        holding.PATIENCE = 0.05

    def __exit__(self, *_: object) -> None:
        self.module.PATIENCE = self.before


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Each block, and in ``nested`` both together too, computed again in the backward pass."""

    def __init__(self, net: nn.Module, nested: bool = False, **options: Any) -> None:
        super().__init__()
        self.net, self.nested, self.options = net, nested, options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._blocks, x, **self.options) if self.nested else self._blocks(x)

    def _blocks(self, x: Tensor) -> Tensor:
        for block in self.net.blocks:
            x = checkpoint(block, x, **self.options)
        return x


checkpoints = pytest.mark.parametrize(
    ("reentrant", "nested"), [(False, False), (True, False), (False, True), (True, True)]
)


def gradients(bank: tcur.AdapterBank, x: Tensor) -> list[Tensor | None]:
    found = [x.grad, *(parameter.grad for parameter in bank.train())]
    x.grad = None
    for parameter in bank.train():
        parameter.grad = None
    return found


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, **EXACT)


def inputs() -> Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)


def plain(form: str, *ids: list[Any], backward: Callable[[list[Tensor]], None]) -> list[Tensor | None]:
    """The gradients without checkpointing."""
    model = make(form)
    bank, x = filled(model, 4), inputs()
    bank.train()
    backward([model(x, adapter_ids=i).square().sum() for i in ids])
    return gradients(bank, x)


def one_after_the_other(losses: list[Tensor]) -> None:
    for loss in losses:
        loss.backward()


def backwards_in_reverse(losses: list[Tensor]) -> None:
    for loss in reversed(losses):
        loss.backward()


def together(losses: list[Tensor]) -> None:
    torch.stack(losses).sum().backward()


A, B = ["0", -1, "2"], ["3", "2", "0"]


@both
@checkpoints
@pytest.mark.parametrize("backward", [one_after_the_other, backwards_in_reverse, together], ids=lambda f: f.__name__)
def test_checkpointing_finds_the_ids_of_its_own_forward_pass(
    form: str, reentrant: bool, nested: bool, backward: Callable[[list[Tensor]], None]
) -> None:
    """Several forward passes before the backward passes, outside of the block and within that of another batch."""
    expected = plain(form, A, B, backward=backward)
    model = make(form)
    bank, x = filled(model, 4), inputs()
    bank.train()
    checkpointed = Checkpointed(model, nested, use_reentrant=reentrant)
    losses = []
    for ids in (A, B):
        with bank.use(ids):
            losses.append(checkpointed(x).square().sum())
    backward(losses)
    same(gradients(bank, x), expected)

    losses = []
    for ids in (A, B):
        with bank.use(ids):
            losses.append(checkpointed(x).square().sum())
    with pytest.warns(UserWarning, match="no adapted layer"), bank.use(["1", "1", "1"]):
        backward(losses)
    same(gradients(bank, x), expected)


@both
@checkpoints
def test_checkpointing_in_another_thread_and_after_a_change(form: str, reentrant: bool, nested: bool) -> None:
    expected = plain(form, A, backward=one_after_the_other)
    model = make(form)
    bank, x = filled(model, 4), inputs()
    parameters = bank.train()
    with bank.use(A):
        loss = Checkpointed(model, nested, use_reentrant=reentrant)(x).square().sum()
    bank.remove("2")
    for at in range(40):
        bank.add(f"new {at}", cores_for(model, 30))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    same([x.grad, *(parameter.grad for parameter in parameters)], expected)


@both
@checkpoints
def test_checkpointing_of_the_own_adapter_beside_a_bank(form: str, reentrant: bool, nested: bool) -> None:
    """Without any batch; and with batches before, by ``use(None)``: otherwise it could be either, and is an error."""
    model = make(form)
    bank, x = filled(model, 4), inputs()
    cores = [stack.core for stack in tcur.stacks(model).values()]
    right = torch.autograd.grad(model(x).square().sum(), cores)
    checkpointed = Checkpointed(model, nested, use_reentrant=reentrant)
    checkpointed(x).square().sum().backward()
    with bank.use(A):
        checkpointed(x).square().sum().backward()
    with bank.use(None):
        loss = checkpointed(x).square().sum()
    loss.backward()
    for core, expected in zip(cores, right, strict=True):
        assert_close(core.grad, 2 * expected, **EXACT)
    unmarked = checkpointed(x).square().sum()
    with pytest.raises(RuntimeError, match="nothing tells for which batch"):
        unmarked.backward()


@both
def test_hooks_that_hide_the_marks_are_an_error_or_need_the_context(form: str) -> None:
    expected = plain(form, A, backward=one_after_the_other)
    model = make(form)
    bank, x = filled(model, 4), inputs()
    bank.train()
    with bank.use(A), torch.autograd.graph.save_on_cpu():
        loss = Checkpointed(model, use_reentrant=False)(x).square().sum()
    with pytest.raises(RuntimeError, match=r"context_fn=bank\.checkpoint_context"):
        loss.backward()
    gradients(bank, x)
    with bank.use(A), torch.autograd.graph.save_on_cpu():
        loss = Checkpointed(model, use_reentrant=False, context_fn=bank.checkpoint_context)(x).square().sum()
    loss.backward()
    same(gradients(bank, x), expected)
    with torch.autograd.graph.save_on_cpu(), bank.use(A):  # around the block they go on working
        loss = Checkpointed(model, use_reentrant=False)(x).square().sum()
    loss.backward()
    same(gradients(bank, x), expected)


def test_hooks_around_the_block_still_see_every_tensor() -> None:
    model = make()
    bank, x = filled(model, 1), inputs()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t), bank.use(["0"]):
        model(x).sum().backward()
    assert len(seen) > 10


def test_slots_are_free_again_after_the_backward_pass() -> None:
    model = make()
    bank, x = filled(model, 4, capacity=1, pool="cpu"), inputs()
    assert len(bank) == 4
    for at in (0, 1, 2, 3):
        loss = model(x, adapter_ids=[str(at)]).sum()
        with pytest.raises(ValueError, match="backward passes that are still to come"), _impatient():
            model(x, adapter_ids=[str((at + 1) % 4)])
        loss.backward()
