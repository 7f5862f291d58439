"""Each sample, or token, of a batch gets what its adapter alone would compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tcurlora_ext as tcur

from .models import BOTH, FORMS, Net, alone, cores_for, filled, make, one_by_one

EXACT = {"rtol": 1e-12, "atol": 1e-12}
both = pytest.mark.parametrize("form", BOTH)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize("adapters", [[1, 0, 2, 0], [2, -1, 0, 2], [1, 1, 1, 1], [-1, -1, -1, -1]], ids=str)
def test_each_sample_has_its_adapter(form: str, tokens: int, adapters: list[int]) -> None:
    model = make(form)
    bank = filled(model)
    x = torch.randn(4, tokens, 8, dtype=torch.float64)
    with bank.use([-1 if at < 0 else str(at) for at in adapters]):
        y = model(x)
    assert_close(y, one_by_one(model, adapters, x), **EXACT)
    assert_close(model(x, adapter_ids=torch.tensor(adapters)), y, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_each_token_has_its_adapter(form: str) -> None:
    model = make(form)
    bank = filled(model, 5)
    x, ids = torch.randn(3, 11, 8, dtype=torch.float64), torch.randint(-1, 5, (3, 11))
    with bank.use(ids):
        y = model(x)
    for at in range(-1, 5):
        assert_close(y[ids == at], alone(model, at, x)[ids == at], **EXACT)


@both
@pytest.mark.parametrize("shape", [(6, 8), (6, 2, 3, 8), (12, 5, 8)], ids=str)
def test_rows_may_be_a_multiple_of_the_samples(form: str, shape: tuple[int, ...]) -> None:
    """Beams and windows: the rows of each sample one after the other."""
    model = make(form)
    bank = filled(model)
    x = torch.randn(shape, dtype=torch.float64)
    with bank.use(["0", "2", "1"]):
        y = model(x)
    times = shape[0] // 3
    assert_close(y, one_by_one(model, [0] * times + [2] * times + [1] * times, x), **EXACT)


@both
def test_token_ids_repeat_with_the_rows(form: str) -> None:
    model = make(form)
    bank = filled(model)
    x, ids = torch.randn(4, 3, 8, dtype=torch.float64), torch.tensor([[0, 1, -1], [2, 2, 0]])
    with bank.use(ids):
        y = model(x)
    assert_close(y, model(x, adapter_ids=ids.repeat_interleave(2, 0)), **EXACT)
    flat = x[:2].flatten(0, 1)
    assert_close(model(flat, adapter_ids=ids), model(flat, adapter_ids=ids.flatten()), **EXACT)


def test_ids_that_do_not_fit_are_an_error_that_names_both_sizes() -> None:
    model = make()
    bank = filled(model)
    with bank.use(["0", "1"]), pytest.raises(ValueError, match=r"blocks\.0\.qkv.*3 rows.*2 ids"):
        model(torch.randn(3, 5, 8, dtype=torch.float64))
    with bank.use(torch.zeros(2, 4, dtype=torch.int64)), pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4\)"):
        model(torch.randn(2, 5, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected a list"), bank.use("0"):
        pass
    with pytest.raises(TypeError, match=r"float32"), bank.use(torch.zeros(2)):
        pass
    with pytest.raises(ValueError, match=r"'nobody' is not in the bank"), bank.use(["nobody"]):
        pass
    with pytest.raises(ValueError, match=r"17 is not in the bank"), bank.use([17]):
        pass


@both
def test_rows_of_the_base_are_the_base_bit_for_bit(form: str, assert_same: Callable[[Tensor, Tensor], None]) -> None:
    torch.manual_seed(0)
    plain = Net(32)
    model = tcur.inject(copy.deepcopy(plain), tcur.TCURConfig(rank=4, target_modules=r"blocks\..*", **FORMS[form]))
    bank = filled(model)
    x = torch.randn(6, 9, 32)
    with bank.use(["0", -1, "1", -1, -1, "0"]):
        y = model(x)
    assert_same(y[[1, 3, 4]], plain(x)[[1, 3, 4]])
    assert (y[[0, 2, 5]] != plain(x)[[0, 2, 5]]).any(-1).all()


@both
def test_an_empty_batch_and_one_of_many_adapters(form: str) -> None:
    model = make(form)
    bank = filled(model, 70)
    assert bank.nbytes > 64 * sum(core.nbytes for core in bank.cores("0").values())  # several segments
    assert model(torch.empty(0, 5, 8, dtype=torch.float64), adapter_ids=[]).shape == (0, 5, 8)
    order = torch.randperm(70).tolist()
    x = torch.randn(70, 3, 8, dtype=torch.float64)
    y = model(x, adapter_ids=[str(at) for at in order])
    assert_close(y, one_by_one(model, order, x), **EXACT)


@both
def test_the_models_own_adapter_computes_without_ids(form: str) -> None:
    model = make(form)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for name, core in cores_for(model, 9).items():
        tcur.stacks(model)[name].core.data.copy_(core)
    before = model(x)
    bank = filled(model)
    assert_close(model(x), before, rtol=0, atol=0)
    assert_close(model(x, adapter_ids=None), before, rtol=0, atol=0)
    with bank.use(["0", -1]):
        y = model(x)
        with bank.use(None):
            assert_close(model(x), before, rtol=0, atol=0)
    assert_close(y, one_by_one(model, [0, -1], x), **EXACT)
    own = bank.add("own", model)
    assert_close(model(x, adapter_ids=[own, "own"]), before, **EXACT)


@both
def test_gradients_are_those_of_each_adapter_alone(form: str) -> None:
    model = make(form)
    bank = filled(model)
    x = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    bank.train()
    model(x, adapter_ids=["0", "2", -1, "0"]).square().sum().backward()
    own = x.detach().clone().requires_grad_()
    for name, rows in {"0": [0, 3], "2": [1], "": [2]}.items():
        single = make(form)
        for stack_name, core in (cores_for(model, int(name)) if name else {}).items():
            tcur.stacks(single)[stack_name].core.data.copy_(core)
        single(own[rows]).square().sum().backward()
        if name:
            for stack_name, parameter in bank.parameters_of(name).items():
                assert_close(parameter.grad, tcur.stacks(single)[stack_name].core.grad, **EXACT)
    assert_close(x.grad, own.grad, **EXACT)
    assert all(parameter.grad is None for parameter in bank.parameters_of("1").values())
    assert all(stack.core.grad is None for stack in tcur.stacks(model).values())


@both
def test_gradients_are_the_same_bits_each_time(form: str, assert_same: Callable[[Tensor, Tensor], None]) -> None:
    found = []
    for _ in range(2):
        model = make(form, torch.float32)
        bank = filled(model, 3)
        torch.manual_seed(1)
        x, ids = torch.randn(8, 40, 8), torch.randint(-1, 3, (8, 40))
        parameters = bank.train()
        model(x, adapter_ids=ids).square().sum().backward()
        found.append([parameter.grad for parameter in parameters])
    for first, second in zip(*found, strict=True):
        assert_same(first, second)


@both
def test_bfloat16_and_autocast_are_as_near_as_for_one_adapter(form: str) -> None:
    exact = make(form)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    expected = one_by_one(exact, [0, 1, -1], x)
    model = make(form, torch.float32).to(torch.bfloat16)
    assert {stack.core.dtype for stack in tcur.stacks(model).values()} == {torch.float32}
    bank = tcur.AdapterBank(model)
    bank.add_all({str(at): cores_for(exact, at) for at in range(2)})
    y = model(x.bfloat16(), adapter_ids=["0", "1", -1])
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), expected, rtol=0.05, atol=0.05)

    cast = make(form, torch.float32)
    bank = tcur.AdapterBank(cast)
    bank.add_all({str(at): cores_for(exact, at) for at in range(2)})
    parameters = bank.train(["0"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = cast(x.float(), adapter_ids=["0", "1", -1])
    assert_close(y.double(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@both
def test_compiled_models_give_the_same(form: str, backend: str) -> None:
    torch.compiler.reset()
    model = make(form)
    bank = filled(model)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    expected = model(x, adapter_ids=["1", -1, "0"])
    (right,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(model, backend=backend)
    with bank.use(["1", -1, "0"]):
        y = compiled(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert_close(y, expected, **EXACT)
    assert_close(found, right, **EXACT)
    assert_close(compiled(x), model(x), **EXACT)
    assert_close(compiled(x, adapter_ids=["1", -1, "0"]), expected, **EXACT)
    torch.compiler.reset()
