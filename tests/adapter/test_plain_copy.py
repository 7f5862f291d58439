"""plain_copy: copies without the operator compute the same, have the same keys and leave the model unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tcurlora_ext as tcur
from tcurlora_ext.adapter.layer.linear import TCURConv1D


class Called(TorchDispatchMode):
    """Records the namespaces of the operators that run within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def namespaces(model: nn.Module, x: Tensor) -> set[str]:
    with torch.no_grad(), Called() as called:
        model(x)
    return called.namespaces


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
def test_the_same_function_without_the_operator(
    network: Any, train: Any, x: Tensor, transform: str, domain: str, merged: bool
) -> None:
    model, x = network.double(), x.double()
    train(tcur.inject(model, tcur.TCURConfig(rank=(3, 2), transform=transform, core_domain=domain)))
    plain = tcur.plain_copy(model, merged)
    assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert namespaces(plain, x) <= {"aten", "prim"}
    assert "tcurlora" in namespaces(model, x)


@pytest.mark.parametrize("merged", [False, True])
def test_the_same_function_of_low_frequencies_alone(network: Any, train: Any, x: Tensor, merged: bool) -> None:
    model, x = network.double(), x.double()
    train(tcur.inject(model, tcur.TCURConfig(rank=2, frequencies=2)))
    plain = tcur.plain_copy(model, merged)
    assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert namespaces(plain, x) <= {"aten", "prim"}


def test_the_model_stays_as_it_is(adapted: Any, state_of: Any, assert_unchanged: Any, x: Tensor) -> None:
    before = state_of(adapted)
    for merged in (False, True):
        plain = tcur.plain_copy(adapted, merged)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
    assert_unchanged(adapted, before)


def test_its_parameters_have_the_names_that_they_had(adapted: Any, network: Any) -> None:
    plain = tcur.plain_copy(adapted)
    assert list(plain.state_dict()) == list(adapted.state_dict())
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in adapted.named_parameters()
    }


def test_merged_it_has_plain_layers_alone(adapted: Any, make_network: Any) -> None:
    merged = tcur.plain_copy(adapted, merged=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in make_network().modules()]


def test_all_its_layers_follow_the_core(adapted: Any, train: Callable[..., Any], x: Tensor) -> None:
    plain = tcur.plain_copy(adapted)
    train(adapted)
    assert not torch.allclose(plain(x), adapted(x))
    for name, stack in tcur.stacks(adapted).items():
        tcur.stacks(plain)[name].core.data.copy_(stack.core)
    assert_close(plain(x), adapted(x))


def test_of_a_merged_model(adapted: Any, x: Tensor) -> None:
    y = adapted(x)
    for merged in (False, True):
        assert_close(tcur.plain_copy(tcur.merge(adapted), merged)(x), y)
    assert "aten" in namespaces(tcur.plain_copy(adapted), x)


def test_its_gradients_are_those_of_the_operator(adapted: Any, x: Tensor) -> None:
    plain = tcur.plain_copy(adapted)
    for model in (plain, adapted):
        model(x).square().sum().backward()
    for name, stack in tcur.stacks(adapted).items():
        assert_close(tcur.stacks(plain)[name].core.grad, stack.core.grad)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_a_layer_of_its_own_and_its_shapes(leading: tuple[int, ...]) -> None:
    layer = tcur.TCURLinear(8, 12, bias=False, rank=2, slices=3)
    layer.stack.set_core_slices(torch.randn(3, 2, 2))
    plain, x = tcur.plain_copy(layer), torch.randn(*leading, 8)
    assert_close(plain(x), layer(x))
    assert namespaces(plain, x) <= {"aten", "prim"}


def test_a_weight_that_lies_transposed() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    model = tcur.inject(transformers.GPT2Model(config).eval(), tcur.TCURConfig(rank=2))
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(torch.randn(stack.core.shape))
    assert any(isinstance(module, TCURConv1D) for module in model.modules())
    tokens = torch.randint(40, (2, 5))
    for merged in (False, True):
        found = tcur.plain_copy(model, merged)(tokens).last_hidden_state
        assert_close(found, model(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_the_factors_trained_too(network: Any, train: Any, x: Tensor) -> None:
    model = train(tcur.inject(network, tcur.TCURConfig(rank=2, trainable="all")))
    assert_close(tcur.plain_copy(model)(x), model(x))


def test_an_adapter_is_saved_from_it_and_loaded(adapted: Any, make_network: Any, x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(7)
    base = make_network()
    model = tcur.inject(make_network(), tcur.TCURConfig(rank=2, core_domain="slice"))
    model.load_state_dict(base.state_dict())
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(torch.randn(stack.core.shape))
    tcur.save_adapter(tcur.plain_copy(model), tmp_path)
    assert_close(tcur.load_adapter(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_is_not_adapted_is_refused(network: Any, merged: bool) -> None:
    with pytest.raises(ValueError, match="Network is not adapted"):
        tcur.plain_copy(network, merged)
