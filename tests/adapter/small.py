"""A small network whose layers have one shape, and the adapter of the tests that use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur


class Net(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm, self.head = nn.BatchNorm1d(8, affine=affine), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


CONFIG = tcur.TCURConfig(rank=2, target_modules=r"body\.\d")


def adapted(**options: Any) -> Net:
    net = tcur.inject(Net(), tcur.TCURConfig(rank=2, target_modules=r"body\.\d", **options))
    for stack in tcur.stacks(net).values():
        stack.set_core_slices(0.3 * torch.randn(stack.slices, *stack.rank))
    assert isinstance(net, Net)
    return net.eval()
