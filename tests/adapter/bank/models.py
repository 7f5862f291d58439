"""Small adapted models with banks, and what one adapter alone computes."""

from __future__ import annotations

import copy
from typing import Any

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
    """Samples and tokens do not mix, so that each can be compared alone."""

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
BOTH = ("coupled", "riding")


def make(form: str = "coupled", dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    """The adapted network, always with the same weights."""
    torch.manual_seed(0)
    config = {"rank": (3, 2), "target_modules": r"blocks\..*", "split_fused": {"qkv": 3}} | FORMS[form] | options
    net = tcur.inject(Net().to(dtype), tcur.TCURConfig(**config))
    assert isinstance(net, Net)
    return net


def cores_for(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        name: 0.3 * torch.randn(stack.core.shape, generator=generator, dtype=stack.core.dtype)
        for name, stack in tcur.stacks(model).items()
    }


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


def alone(model: nn.Module, seed: int, x: Tensor) -> Tensor:
    """What one adapter alone computes, -1 for the base."""
    return with_cores(model, None if seed < 0 else cores_for(model, seed))(x)


def one_by_one(model: nn.Module, adapters: list[int], x: Tensor) -> Tensor:
    """Each sample with its adapter alone."""
    return torch.cat([alone(model, at, x[i : i + 1]) for i, at in enumerate(adapters)])
