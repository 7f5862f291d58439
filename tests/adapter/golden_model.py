"""The network that the adapter files in tests/data/adapters were written for, the same on every machine and torch.

Weights come from integer arithmetic and not from a random generator, so that they are equal to the bit everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HIDDEN, CLASSES, BLOCKS = 8, 12, 3, 3


class Block(nn.Module):
    """A fused projection of three slices, and three single ones; sums keep the activations small."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"linear1": nn.Linear(WIDTH, HIDDEN), "linear2": nn.Linear(HIDDEN, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](torch.tanh(q) * torch.tanh(k) + v)
        return x + self.mlp["linear2"](torch.tanh(self.mlp["linear1"](x)))


class Network(nn.Module):
    """Three blocks, a norm with running statistics and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


def fixed(*shape: int, salt: int = 0, scale: float = 1.0) -> Tensor:
    """Entries in [-scale/2, scale/2), float32, from a multiplicative hash of their index."""
    index = torch.arange(salt * 1_000_003 + 1, salt * 1_000_003 + 1 + torch.Size(shape).numel(), dtype=torch.int64)
    return ((((index * 2654435761) % 2**32) / 2**32 - 0.5) * scale).to(torch.float32).view(shape)


def network(dtype: torch.dtype = torch.float32) -> Network:
    """The plain network in eval mode."""
    model = Network().eval()
    with torch.no_grad():
        for salt, parameter in enumerate(model.parameters()):
            parameter.copy_(fixed(*parameter.shape, salt=salt, scale=0.9))
    return model.to(dtype)


def inputs() -> Tensor:
    """(5, 8) float32."""
    return fixed(5, WIDTH, salt=99, scale=2.0)
