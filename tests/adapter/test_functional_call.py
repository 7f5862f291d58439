"""``torch.func.functional_call`` with other cores, and torch.func's transforms over them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import tcurlora_ext as tcur


def cores_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith(".core")}


@pytest.fixture
def others(adapted: Any) -> list[dict[str, Tensor]]:
    """Three adapters of one base: their cores by parameter name."""
    return [{name: torch.randn_like(core) for name, core in cores_of(adapted).items()} for _ in range(3)]


def with_cores(model: nn.Module, cores: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(cores, strict=False)
    return other


def test_with_other_cores_it_is_the_other_model(adapted: Any, others: list[dict[str, Tensor]], x: Tensor) -> None:
    before = adapted(x)
    for cores in others:
        expected = copy.deepcopy(adapted)
        for name, core in cores.items():
            expected.get_parameter(name).data.copy_(core)
        found = functional_call(adapted, cores, (x,))
        assert torch.equal(found, expected(x))
        assert not torch.allclose(found, before)
    assert torch.equal(adapted(x), before)


@pytest.mark.parametrize("transform", ["dft", "dct", "identity"])
@pytest.mark.parametrize("domain", ["fourier", "slice"])
@pytest.mark.filterwarnings("error")
def test_several_adapters_in_one_call(network: Any, train: Any, x: Tensor, transform: str, domain: str) -> None:
    model = train(tcur.inject(network, tcur.TCURConfig(rank=2, transform=transform, core_domain=domain)))
    cores = {name: torch.stack([core, -core, 2 * core]) for name, core in cores_of(model).items()}
    found = vmap(lambda c: functional_call(model, c, (x,)))(cores)
    for i in range(3):
        assert_close(found[i], functional_call(model, {k: v[i] for k, v in cores.items()}, (x,)))
    assert not torch.allclose(found[0], found[1])


def test_the_gradient_of_the_cores(adapted: Any, x: Tensor) -> None:
    found = grad(lambda cores: functional_call(adapted, cores, (x,)).square().sum())(cores_of(adapted))
    adapted(x).square().sum().backward()
    for name, gradient in found.items():
        assert_close(gradient, adapted.get_parameter(name).grad)


def test_the_gradients_of_every_example(adapted: Any, x: Tensor) -> None:
    cores = cores_of(adapted)
    loss = lambda cores, one: functional_call(adapted, cores, (one[None],)).square().sum()  # noqa: E731
    found = vmap(grad(loss), (None, 0))(cores, x)
    adapted(x).square().sum().backward()
    for name, gradients in found.items():
        assert len(gradients) == len(x)
        assert_close(gradients.sum(0), adapted.get_parameter(name).grad)
