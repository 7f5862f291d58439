"""Adapted models copied, pickled, moved and loaded: every stack still has one core afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURLayer


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


def assert_one_core_a_stack(model: nn.Module) -> None:
    """Every layer uses the registered stack, and changing its core changes every layer."""
    stacks = tcur.stacks(model)
    layers = [layer for layer in model.modules() if isinstance(layer, TCURLayer)]
    assert {id(layer.stack) for layer in layers} == {id(stack) for stack in stacks.values()}
    assert sum(name.endswith("core") for name, _ in model.named_parameters(remove_duplicate=False)) == len(stacks)
    for layer in layers:
        x = torch.randn(3, layer.in_features).to(layer.weight)
        before = layer(x)
        with torch.no_grad():
            layer.stack.core.add_(1.0)
        assert not torch.equal(layer(x), before)
        with torch.no_grad():
            layer.stack.core.sub_(1.0)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_shares_nothing(adapted: Any, x: Tensor, how: str) -> None:
    y, core = adapted(x), tcur.stacks(adapted)["8x8"].core
    other: Any = COPIES[how](adapted)
    assert torch.equal(other(x), y)
    assert_one_core_a_stack(other)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in adapted.named_parameters() if p.requires_grad
    ]
    assert tcur.stacks(other)["8x8"].core is not core
    with torch.no_grad():
        tcur.stacks(other)["8x8"].core.zero_()
    assert torch.equal(adapted(x), y)
    tcur.remove(tcur.unmerge(tcur.merge(other)))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_layer_of_its_own_works(how: str) -> None:
    layer = tcur.TCURLinear(6, 6, rank=2)
    layer.stack.set_core_slices(torch.randn(1, 2, 2))
    x = torch.randn(2, 6)
    assert torch.equal(COPIES[how](layer)(x), layer(x))


def test_moves_and_dtypes_keep_one_core(adapted: Any, x: Tensor) -> None:
    y = adapted(x)
    for move in (lambda m: m.to("cpu"), lambda m: m.double(), lambda m: m.float(), lambda m: m.requires_grad_(True)):
        model = move(copy.deepcopy(adapted))
        assert_one_core_a_stack(model)
        assert_close(model(x.to(model.head.weight)).to(y), y, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(adapted).to("cpu")(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_float32_cores_and_train(adapted: Any, x: Tensor, dtype: torch.dtype) -> None:
    cores = {name: stack.core.detach().clone() for name, stack in tcur.stacks(adapted).items()}
    exact = adapted(x)
    y = adapted.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.float(), exact, rtol=0.1, atol=0.1)  # two blocks in 8 or 11 bits
    y.float().square().sum().backward()
    for name, stack in tcur.stacks(adapted).items():
        assert stack.core.dtype == torch.float32
        assert_close(stack.core, cores[name], rtol=1e-6, atol=1e-6)
        assert stack.core.grad is not None
        assert stack.core.grad.dtype == torch.float32
    assert_one_core_a_stack(adapted)


def test_an_optimizer_made_before_a_move_goes_on(adapted: Any, x: Tensor) -> None:
    cores = [stack.core for stack in tcur.stacks(adapted).values()]
    optimizer = torch.optim.SGD(cores, 0.1)
    adapted.bfloat16()
    adapted(x.bfloat16()).float().square().sum().backward()
    before = [core.detach().clone() for core in cores]
    optimizer.step()
    assert all(stack.core is core for stack, core in zip(tcur.stacks(adapted).values(), cores, strict=True))
    assert all(not torch.equal(core, old) for core, old in zip(cores, before, strict=True))


def test_the_state_of_a_plain_model_loads_and_comes_back(
    network: Any, make_network: Any, config: tcur.TCURConfig, x: Tensor
) -> None:
    """As for a checkpoint of the base that is loaded after injection."""
    other = make_network()
    expected = copy.deepcopy(other)
    tcur.inject(network, config)
    result = network.load_state_dict(other.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(network(x), other.requires_grad_(False)(x))
    tcur.inject(expected, config)  # rows, columns and scale are those of the loaded weights
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name

    back = make_network()
    state = network.state_dict()
    own = [key for key in state if key.startswith("tcur_stacks.")]
    result = back.load_state_dict(state, strict=False)
    assert not result.missing_keys
    assert sorted(result.unexpected_keys) == sorted(own)
    back.load_state_dict({key: value for key, value in state.items() if key not in own})
    assert torch.equal(back.requires_grad_(False)(x), network(x))


def test_another_base_under_trained_cores_gives_a_warning(adapted: Any, make_network: Any) -> None:
    with pytest.warns(UserWarning, match=r"base weights of .* changed under a trained core"):
        adapted.load_state_dict(make_network().state_dict())


@pytest.mark.filterwarnings("error")
def test_its_own_state_loads_into_a_twin(adapted: Any, make_network: Any, config: tcur.TCURConfig, x: Tensor) -> None:
    twin = tcur.inject(make_network(), config)
    cores = [stack.core for stack in tcur.stacks(twin).values()]
    result = twin.load_state_dict(adapted.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(twin(x), adapted(x))
    assert all(a is b.core for a, b in zip(cores, tcur.stacks(twin).values(), strict=True))
    assert_one_core_a_stack(twin)


@pytest.mark.filterwarnings("error")
def test_the_state_survives_a_file_of_weights_only(adapted: Any, make_network: Any, config: Any, x: Tensor) -> None:
    file = io.BytesIO()
    torch.save(adapted.state_dict(), file)
    file.seek(0)
    twin = tcur.inject(make_network(), config)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), adapted(x))


def test_the_keys_of_the_base_stay(make_network: Any, config: tcur.TCURConfig) -> None:
    plain, adapted = make_network(), tcur.inject(make_network(), config)
    keys = list(adapted.state_dict())
    assert [key for key in keys if not key.startswith("tcur_stacks.")] == list(plain.state_dict())
    kinds = {key.rsplit(".", 1)[-1] for key in keys if key.startswith("tcur_stacks.")}
    assert kinds == {"core", "col", "row", "rows", "columns", "scale"}
