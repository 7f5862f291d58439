"""A small network with the names of MONAI's blocks, and helpers for tests of adapted models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcurlora_ext as tcur


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out_proj(torch.softmax(q @ k.mT, -1) @ v)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(torch.tanh(self.linear1(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Network(nn.Module):
    """Stacks by shape at width 8 and two blocks: 8x8 (q, k, v, out; S=8), 16x8 (S=2), 8x16 (S=2)."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.fixture
def network() -> Network:
    return Network().eval()


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Network]:
    return lambda **options: Network(**options).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 6)


@pytest.fixture
def config() -> tcur.TCURConfig:
    return tcur.TCURConfig(rank=2)


@pytest.fixture
def adapted(network: Network, config: tcur.TCURConfig) -> Network:
    """An adapted network with cores that change the output."""
    tcur.inject(network, config)
    return _train(network)


def _train(model: Any, size: float = 0.3) -> Any:
    for stack in tcur.stacks(model).values():
        stack.set_core_slices(size * torch.randn(stack.slices, *stack.rank))
    return model


@pytest.fixture(scope="session")
def train() -> Callable[..., Any]:
    """Give every core random values."""
    return _train


def _state(model: nn.Module) -> dict[str, Any]:
    """What an error must not change: modules, parameters and buffers, with their values, flags and identities."""
    state: dict[str, Any] = {f"module {n}": (id(m), type(m), m.training) for n, m in model.named_modules()}
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, t in tensors:
            state[f"{kind} {name}"] = (id(t), t.dtype, t.requires_grad, t.detach().clone())
    return state


def _unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name][:3] == value[:3], name
        if len(value) == 4:
            torch.testing.assert_close(after[name][3], value[3], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture(scope="session")
def state_of() -> Callable[[nn.Module], dict[str, Any]]:
    return _state


@pytest.fixture(scope="session")
def assert_unchanged() -> Callable[[nn.Module, dict[str, Any]], None]:
    return _unchanged
