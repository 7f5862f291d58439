"""Small networks to plan for, on any device or on meta, and factors learned on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

TOKENS = 35
NAMES = ["qkv", "out_proj", "linear1", "linear2"]


class Block(nn.Module):
    """A fused projection, an output projection of the same width, and an MLP."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"linear1": nn.Linear(width, 2 * width), "linear2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["out_proj"](q * k + v)
        return x + self.mlp["linear2"](nn.functional.gelu(self.mlp["linear1"](x)))


class SiblingBlock(nn.Module):
    """q, k and v as three layers with the same input."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj")})

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.attn["q_proj"](x) * self.attn["k_proj"](x) + self.attn["v_proj"](x)


def build(block: type[nn.Module] = Block, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[block() for _ in range(depth)])


def meta(block: type[nn.Module] = Block, depth: int = 3) -> nn.Module:
    with torch.device("meta"):
        return build(block, depth)


def leaf() -> Tensor:
    return torch.randn(5, 7, 32, requires_grad=True)


def learned(config: tcur.TCURConfig, model: nn.Module, **options: Any) -> tcur.Subspace:
    """Factors from three steps on one batch, of the network or of its `blocks`."""
    x = torch.linspace(-2, 2, 4 * 3 * 32).view(4, 3, 32).sin()
    step = lambda model: getattr(model, "blocks", model)(x).square().mean()  # noqa: E731
    return tcur.learn_factors(model, config, step, 3, **options)
