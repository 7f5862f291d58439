"""A small task for the network of the other tests, on which factors are learned in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

FORMS: dict[str, dict[str, Any]] = {
    "own cores": {"stack_by": "none", "transform": "identity", "factors": "learned"},
    "coupled": {"factors": "learned"},
    "coupled, lowest frequencies": {"factors": "learned", "frequencies": 2},
    "dct": {"factors": "learned", "transform": "dct"},
    "rows alone, own cores": {"stack_by": "none", "transform": "identity", "factors": "learned_rows"},
    "rows alone, coupled": {"factors": "learned_rows"},
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tcur.TCURConfig:
    return tcur.TCURConfig(rank=2, **FORMS[request.param])


@pytest.fixture
def step() -> Callable[[nn.Module], Tensor]:
    """A step of training: the loss of fixed inputs and labels."""
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(4, 10, 6, generator=generator), torch.randint(0, 3, (4, 10), generator=generator)
    return lambda model: nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())


@pytest.fixture
def subspace(network: nn.Module, form: tcur.TCURConfig, step: Callable[[nn.Module], Tensor]) -> tcur.Subspace:
    return tcur.learn_factors(network, form, step, steps=4, unfreeze="head")
