"""What a bank holds: names, handles, slots and memory, with a capacity and with a pool."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.operator.bank.plan import add_sorted

from .models import cores_for, filled, make, one_by_one

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, 8, dtype=torch.float64)


def test_names_handles_and_cores() -> None:
    model = make()
    bank = tcur.AdapterBank(model)
    first = bank.add("first", cores_for(model, 1))
    second = bank.add("second")
    assert bank.names == ["first", "second"]
    assert (len(bank), "first" in bank, "third" in bank) == (2, True, False)
    assert first != second
    assert bank.cores("second").keys() == tcur.stacks(model).keys()
    assert not any(core.any() for core in bank.cores("second").values())
    for name, core in bank.cores("first").items():
        assert_close(core, cores_for(model, 1)[name], rtol=0, atol=0)
        core.zero_()  # a copy
        assert bank.cores("first")[name].any()
    bank.replace("second", cores_for(model, 2))
    x = inputs(2)
    assert_close(model(x, adapter_ids=[second, first]), one_by_one(model, [2, 1], x), **EXACT)
    bank.remove("first")
    assert bank.names == ["second"]
    third = bank.add("first")
    assert third not in (first, second)
    with pytest.raises(ValueError, match=f"{first} is not in the bank"):
        model(x, adapter_ids=[first, second])


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = make()
    bank = filled(model, 1)
    good = cores_for(model, 0)
    name = next(iter(good))
    for wrong, message in (
        ({name: good[name]}, "its stacks are"),
        (good | {name: good[name][:1]}, rf"core of stack {name} .*expected"),
        (good | {name: good[name] / 0}, rf"stack {name} has NaN or infinite"),
        (good | {name: good[name].long()}, rf"stack {name} is torch.int64"),
        (make(selection="inverse-norm"), "has rows"),
        (make(rank=(2, 2)), "has rank"),
        (make(alpha=2.0), "has scale"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.add("wrong", wrong)
        with pytest.raises(ValueError, match=message):
            bank.replace("0", wrong)
    with pytest.raises(ValueError, match="'0' is in the bank already"):
        bank.add("0")
    for change in (bank.remove, bank.cores, bank.parameters_of, lambda name: bank.replace(name, None)):
        with pytest.raises(ValueError, match="'nobody' is not in the bank"):
            change("nobody")
    assert bank.names == ["0"]
    assert_close(bank.cores("0")[name], good[name], rtol=0, atol=0)


def test_models_that_cannot_have_a_bank_are_refused() -> None:
    with pytest.raises(ValueError, match="not adapted"):
        tcur.AdapterBank(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"stack 8x8 trains C and R"):
        tcur.AdapterBank(make(trainable="all"))
    for options, message in (
        ({"capacity": 0}, "capacity"),
        ({"pool": "disk", "capacity": 2}, "pool"),
        ({"pool": "cpu"}, "without a capacity"),
    ):
        with pytest.raises(ValueError, match=message):
            tcur.AdapterBank(make(), **options)


def test_a_changed_model_is_refused_by_name() -> None:
    model = make()
    bank = filled(model)
    assert len(bank) == 3
    x = inputs(1)
    tcur.merge(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv is merged"):
        model(x, adapter_ids=["0"])
    tcur.unmerge(model)
    state = model.state_dict()
    model.load_state_dict(state)  # the same weights: nothing has changed
    model(x, adapter_ids=["0"])
    model.load_state_dict({n: v for n, v in make().state_dict().items() if "stacks" not in n} | {
        n: torch.randn_like(v) for n, v in state.items() if "stacks" not in n}, strict=False)  # fmt: skip
    with pytest.raises(ValueError, match="other rows or columns"):
        model(x, adapter_ids=["0"])
    dropping = make(dropout=0.5)
    keep = filled(dropping)
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv: dropout is 0.5"):
        dropping(x, adapter_ids=["0"])
    assert_close(dropping.eval()(x, adapter_ids=["0"]), one_by_one(dropping, [0], x), **EXACT)
    assert len(keep) == 3


def test_a_capacity_without_a_pool_is_the_largest_number() -> None:
    model = make()
    bank = filled(model, 2, capacity=2)
    with pytest.raises(ValueError, match=r"holds 2 adapters and gets 1 more, its capacity is 2"):
        bank.add("more")
    bank.remove("0")
    bank.add("more")
    assert bank.names == ["1", "more"]


def test_a_pool_pages_the_adapters_used_last_to_the_device() -> None:
    model = make()
    bank = filled(model, 9, capacity=3, pool="cpu")
    x = inputs(3)
    for order in ([0, 1, 2], [3, 4, 5], [8, 0, 3], [8, 8, 1], [7, 6, 8], [2, 5, -1]):
        y = model(x, adapter_ids=[-1 if at < 0 else str(at) for at in order])
        assert_close(y, one_by_one(model, order, x), **EXACT)
    bank.replace("8", cores_for(model, 20))
    assert_close(model(x, adapter_ids=["8", "2", "8"]), one_by_one(model, [20, 2, 20], x), **EXACT)
    with pytest.raises(ValueError, match=r"4 different adapters, the capacity of the device is 3"):
        model(inputs(4), adapter_ids=["0", "1", "2", "3"])


def test_what_a_batch_uses_stays_until_it_ends() -> None:
    model = make()
    bank = filled(model, 2)
    x = inputs(2)
    expected = one_by_one(model, [0, 1], x)
    with bank.use(["0", "1"]):
        bank.replace("0", cores_for(model, 7))
        bank.remove("1")
        for at in range(40):
            bank.add(f"new {at}", cores_for(model, at))
        assert_close(model(x), expected, **EXACT)
    assert_close(model(x, adapter_ids=["0", "new 3"]), one_by_one(model, [7, 3], x), **EXACT)


def test_slots_are_used_again_and_live_ones_do_not_move() -> None:
    model = make()
    bank = filled(model, 30)
    for parameter in bank.train(["5"]):
        parameter.requires_grad_()
    places = {name: p.data_ptr() for name, p in bank.parameters_of("5").items()}
    before = bank.nbytes
    for _ in range(5):
        for at in range(10, 20):
            bank.remove(str(at))
        for at in range(10, 20):
            bank.add(str(at), cores_for(model, at))
        bank.replace("1", cores_for(model, 1))
        model(inputs(2), adapter_ids=["5", "11"]).sum().backward()
    gc.collect()
    assert bank.nbytes == before
    for at in range(30, 200):
        bank.add(str(at))
    assert {name: p.data_ptr() for name, p in bank.parameters_of("5").items()} == places
    assert bank.nbytes > before
    x = inputs(3)
    assert_close(model(x, adapter_ids=["29", "11", "0"]), one_by_one(model, [29, 11, 0], x), **EXACT)


@pytest.mark.parametrize("pool", [None, "cpu"])
def test_an_adapter_takes_the_memory_of_its_cores(pool: str | None) -> None:
    model = make()
    bank = tcur.AdapterBank(model, pool=pool, capacity=None if pool is None else 1)
    one = sum(stack.core.nbytes for stack in tcur.stacks(model).values())
    bank.add("first")
    start = bank.nbytes
    bank.add_all({str(at): None for at in range(5000)})
    assert bank.nbytes - start <= 1.05 * 5000 * one


def test_a_batch_without_effect_is_a_warning() -> None:
    bank = filled(make())
    with pytest.warns(UserWarning, match="no adapted layer"), bank.use(["0"]):
        pass


def test_the_keyword_is_gone_with_the_bank() -> None:
    model = make()
    bank = filled(model)
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    del bank
    gc.collect()
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (hooks[0] - 1, hooks[1] - 1)


def test_ids_are_cleared_after_an_exception() -> None:
    model = make()
    bank = filled(model)
    x = inputs(2)
    own = model(x)
    for wrong in (x[..., :5], x.flatten(0, 1)[:3]):
        with pytest.raises(ValueError, match=r"blocks\.0\.qkv"):
            model(wrong, adapter_ids=["0", "1"])
        assert_close(model(x), own, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"blocks\.0\.qkv"), bank.use(["0", "1"]):
            model(wrong)
        assert_close(model(x), own, rtol=0, atol=0)
    with pytest.raises(ValueError, match="not in the bank"):
        model(x, adapter_ids=["0", "nobody"])
    assert_close(model(x), own, rtol=0, atol=0)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_a_copy_of_the_model_has_no_bank() -> None:
    model = make()
    bank = filled(model)
    other = copy.deepcopy(model)
    x = inputs(1)
    with pytest.warns(UserWarning, match="no adapted layer"), bank.use(["0"]):
        assert_close(other(x), one_by_one(model, [-1], x), **EXACT)


def test_a_weight_that_trains_is_refused() -> None:
    model = make()
    bank = filled(model)
    assert len(bank) == 3
    model.blocks[1].out.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"blocks\.1\.out: its weight trains"):
        model(inputs(1), adapter_ids=["0"])
    with torch.no_grad():
        model(inputs(1), adapter_ids=["0"])


def test_what_a_gpu_sums_by_sorting_is_the_same_sum() -> None:
    owner, parts = torch.tensor([2, 0, 2, 1, 0, 2]), torch.randn(3, 6, 4, 5, dtype=torch.float64)
    expected = torch.zeros(3, 4, 4, 5, dtype=torch.float64).index_add_(1, owner, parts)
    assert_close(add_sorted(torch.zeros_like(expected), owner, parts), expected, **EXACT)
