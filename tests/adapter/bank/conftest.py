"""Small models with banks, and what one adapter alone computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur


class Block(nn.Module):
    """Square and other layers, one of them with three fused slices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(torch.sigmoid(q + k) * v)
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# Every form in which a stack computes: coupled slices in both domains, the cosine transform, low frequencies alone, and
# a core for each slice, which rides on the base product.
FORMS: dict[str, dict[str, Any]] = {
    "coupled": {},
    "coupled slices": {"core_domain": "slice"},
    "dct": {"transform": "dct"},
    "frequencies": {"frequencies": 2},
    "riding": {"transform": "identity"},
    "riding, one slice": {"stack_by": "none", "split_fused": {}},
}


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    torch.manual_seed(0)
    config = tcur.TCURConfig(**{"rank": (3, 2), "target_modules": r"blocks\..*", "split_fused": {"qkv": 3}} | options)
    return tcur.inject(Net().to(dtype), config)


def cores_for(model: nn.Module, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(100 + seed)
    return {name: 0.3 * torch.randn_like(stack.core) for name, stack in tcur.stacks(model).items()}


def with_cores(model: nn.Module, cores: dict[str, Tensor] | None) -> nn.Module:
    """A copy of the model whose own adapter has these cores; None: zeros, the base."""
    alone = copy.deepcopy(model)
    with torch.no_grad():
        for name, stack in tcur.stacks(alone).items():
            stack.core.zero_() if cores is None else stack.core.copy_(cores[name])
    return alone


def filled(model: nn.Module, number: int = 3, **options: Any) -> tcur.AdapterBank:
    """A bank with adapters "0", "1", ..., whose cores are ``cores_for(model, 0)`` and so on."""
    bank = tcur.AdapterBank(model, **options)
    for at in range(number):
        bank.add(str(at), cores_for(model, at))
    return bank


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def model(request: pytest.FixtureRequest) -> Net:
    return make(**request.param)


@pytest.fixture(params=["coupled", "riding"])
def both(request: pytest.FixtureRequest) -> Net:
    """One model of each of the two forms."""
    return make(**FORMS[request.param])


@pytest.fixture(scope="session")
def tools() -> Any:
    class Tools:
        make, cores_for, with_cores, filled = map(staticmethod, (make, cores_for, with_cores, filled))
        forms = FORMS

        @staticmethod
        def row_by_row(model: nn.Module, x: Tensor, adapters: list[int]) -> Tensor:
            """Each sample with its adapter alone, -1 for the base."""
            return torch.cat(
                [
                    with_cores(model, None if at < 0 else cores_for(model, at))(x[i : i + 1])
                    for i, at in enumerate(adapters)
                ]
            )

    return Tools


Make = Callable[..., Any]
