"""Training heads and norms of adapters of a bank: together as apart, and through activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tcurlora_ext as tcur

from .models import BOTH, cores_for
from .test_training import batches, checkpoints
from .with_heads import MODULES, OWN, filled, make, own_for, plain, trained

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("pool", [None, "cpu"])
def test_trained_together_equal_trained_apart(form: str, pool: str | None) -> None:
    """Adam's momentum too; adapters that do not train, and the base, are in the batches and stay as they are."""
    model = make(form)
    bank = filled(model, 6, pool=pool, capacity=None if pool is None else 6)
    optimizer = torch.optim.AdamW(bank.train(["0", "1", "2", "3"]), lr=1e-2)
    for present, x, target in batches(6, 5):
        y = model(x[[*present, 0]], adapter_ids=[*map(str, present), -1])
        optimizer.zero_grad()
        (y[:-1] - target[present][..., :5]).square().sum().backward()
        for at in range(4):
            grads = [parameter.grad for parameter in bank.parameters_of(str(at)).values()]
            assert len(grads) == len(tcur.stacks(model)) + len(OWN)
            assert all((grad is None) == (at not in present) for grad in grads)
        optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    for at in range(6):
        alone = trained(at, form)
        optimizer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2)
        for present, x, target in batches(6, 5):
            if at in present and at < 4:
                optimizer.zero_grad()
                (alone(x[at : at + 1]) - target[at : at + 1, :, :5]).square().sum().backward()
                optimizer.step()
        found = bank.cores(str(at))
        for name in OWN:
            assert_close(found[name], alone.get_parameter(name).detach(), **EXACT)
            assert torch.equal(found[name], own_for(at)[name]) == (at >= 4)
        for name, stack in tcur.stacks(alone).items():
            assert_close(found[name], stack.core.detach(), **EXACT)


def test_gradients_of_the_input_and_the_same_bits_each_time() -> None:
    torch.manual_seed(1)
    values, ids, runs = torch.randn(8, 7, 8, dtype=torch.float64), torch.randint(-1, 3, (8, 7)), []
    for _ in range(2):
        model, x = make(), values.clone().requires_grad_()
        bank = filled(model, 3)
        parameters = bank.train(["0", "2"])
        model(x, adapter_ids=ids).square().sum().backward()
        runs.append([x.grad, *(parameter.grad for parameter in parameters)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    x = values.clone().requires_grad_()
    for at in range(-1, 3):
        single = plain() if at < 0 else trained(at)
        single(x)[ids == at].square().sum().backward()
    assert_close(runs[0][0], x.grad, **EXACT)


def test_training_starts_at_the_base_and_ends() -> None:
    model, x = make(), torch.randn(2, 3, 8, dtype=torch.float64)
    bank = filled(model, 4, capacity=2, pool="cpu")
    bank.add("new")
    optimizer = torch.optim.SGD(bank.train(["new"]), lr=0.01)
    losses = []
    with bank.use(["new", "1"]):
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(model(x)[0].square().sum())
            losses[-1].backward()
            optimizer.step()
    assert_close(losses[0], plain()(x[:1]).square().sum(), **EXACT)
    assert losses[2] < losses[1] < losses[0]
    after = bank.cores("new")
    assert (after["head.weight"] != plain().head.weight).all()
    y = model(x, adapter_ids=["new", "1"]).detach()
    bank.train(["new"], mode=False)
    for other in (["2", "3"], ["0", "1"]):
        model(x, adapter_ids=other)
    assert_close(model(x, adapter_ids=["new", "1"]), y, **EXACT)
    assert not y.requires_grad


@pytest.mark.parametrize("pool", [None, "cpu"])
def test_training_that_starts_while_a_batch_runs_does_not_change_the_batch(pool: str | None) -> None:
    """Without gradients heads are read in place: the adapter that trains gets another one."""
    model, values = make(), torch.randn(2, 3, 8, dtype=torch.float64)
    bank = filled(model, 3, pool=pool, capacity=None if pool is None else 4)
    right = values.clone().requires_grad_()
    expected = model(right, adapter_ids=["0", "1"])
    expected.square().sum().backward()
    x = values.clone().requires_grad_()
    with bank.use(["0", "1"]):
        y = model(x)
        with torch.no_grad():
            assert_close(model(x), expected.detach(), **EXACT)
        for parameter in bank.train(["0"]):
            parameter.data.fill_(7)
        bank.replace("2", cores_for(model, 5) | own_for(5))
        with torch.no_grad():
            assert_close(model(x), expected.detach(), **EXACT)
        assert_close(model(x), expected, **EXACT)
    y.square().sum().backward()
    assert_close(x.grad, right.grad, **EXACT)
    bank.train(["0"], mode=False)
    assert all(bool((value == 7).all()) for value in bank.cores("0").values())


def test_what_autograd_saved_stays_where_other_hooks_hide_the_batchs() -> None:
    """The batch's places are free after its block then, and written again."""
    model, values = make(), torch.randn(2, 3, 8, dtype=torch.float64)
    bank = filled(model, 1, capacity=1, pool="cpu")
    found = []
    for change in (False, True):
        x = values.clone().requires_grad_()
        with bank.use(["0", -1]), torch.autograd.graph.save_on_cpu():
            loss = model(x).square().sum()
        if change:
            for at in range(1, 4):
                bank.add(str(at), cores_for(model, at) | own_for(at))
                with torch.no_grad():
                    model(values, adapter_ids=[str(at), -1])
        loss.backward()
        found.append(x.grad)
    assert_close(*found, **EXACT)


class Checkpointed(torch.nn.Module):
    """The whole model, head and norm with it, computed again in the backward pass."""

    def __init__(self, model: torch.nn.Module, nested: bool, reentrant: bool) -> None:
        super().__init__()
        self.model, self.nested, self.reentrant = model, nested, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.nested:
            return checkpoint(self._parts, x, use_reentrant=self.reentrant)
        return self._parts(x)

    def _parts(self, x: Tensor) -> Tensor:
        x = self.model.net(x)
        x = checkpoint(self.model.norm, x, use_reentrant=self.reentrant)
        return checkpoint(self.model.head, x, use_reentrant=self.reentrant)


@checkpoints
def test_checkpointing_finds_the_head_of_its_own_forward_pass(reentrant: bool, nested: bool) -> None:
    """With two batches before their backward passes, and a change of the bank in between."""
    torch.manual_seed(2)
    values, found = torch.randn(3, 4, 8, dtype=torch.float64), []
    for checkpointed in (False, True):
        model, x = make(), values.clone().requires_grad_()
        bank = filled(model, 4)
        parameters = bank.train(["0", "1", "2"])
        run = Checkpointed(model, nested, reentrant) if checkpointed else model
        losses = []
        for ids in (["0", -1, "3"], ["3", "2", "0"]):
            with bank.use(ids):
                losses.append(run(x).square().sum())
        bank.replace("3", cores_for(model, 9) | own_for(9))
        bank.remove("1")
        for loss in losses:
            loss.backward()
        found.append([x.grad, *(parameter.grad for parameter in parameters)])
    for expected, again in zip(*found, strict=True):
        assert (expected is None) == (again is None)
        if expected is not None:
            assert_close(again, expected, **EXACT)
    assert found[0][-1] is not None


def test_the_models_own_head_trains_beside_a_bank() -> None:
    model, x = make(), torch.randn(2, 3, 8, dtype=torch.float64)
    bank = filled(model, 1)
    tcur.unfreeze(model, MODULES)
    model(x).square().sum().backward()
    right = [model.get_parameter(name).grad.clone() for name in OWN]
    assert not model(x, adapter_ids=["0", -1]).requires_grad  # nor do rows of the base train it
    with bank.use(None):
        model(x).square().sum().backward()
    for name, grad in zip(OWN, right, strict=True):
        assert_close(model.get_parameter(name).grad, 2 * grad, **EXACT)
