"""A small model with a norm and a head that train beside the cores, and what adapters alone compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tcurlora_ext as tcur

from .models import FORMS, Net, cores_for

MODULES = ["norm", "head"]
OWN = ["norm.weight", "norm.bias", "head.weight", "head.bias"]


class WithHead(nn.Module):
    """One output per token, or per sample where ``pooled``."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.net, self.norm, self.head, self.pooled = Net(), nn.LayerNorm(8), nn.Linear(8, 5), pooled

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.net(x))
        return self.head(x.mean(1) if self.pooled else x)


def plain(pooled: bool = False, dtype: torch.dtype = torch.float64) -> WithHead:
    torch.manual_seed(0)
    return WithHead(pooled).to(dtype)


def make(form: str = "coupled", pooled: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    config: dict[str, Any] = {"rank": (3, 2), "target_modules": r"net\..*", "split_fused": {"qkv": 3}} | FORMS[form]
    return tcur.inject(plain(pooled, dtype), tcur.TCURConfig(**config))


def own_for(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(500 + seed)
    shapes = dict(zip(OWN, [(8,), (8,), (5, 8), (5,)], strict=True))
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def trained(seed: int, form: str = "coupled", own: bool = True) -> nn.Module:
    """A model with an adapter of its own, with a norm and a head, or with those of the base."""
    model = make(form)
    for name, core in cores_for(model, seed).items():
        tcur.stacks(model)[name].core.data.copy_(core)
    if own:
        tcur.unfreeze(model, MODULES)
        for name, value in own_for(seed).items():
            model.get_parameter(name).data.copy_(value)
    return model


def saved(folder: Path, seed: int, form: str = "coupled", own: bool = True) -> Path:
    return tcur.save_adapter(trained(seed, form, own), folder / f"{seed}.safetensors")


def filled(model: nn.Module, number: int, **options: Any) -> tcur.AdapterBank:
    """A bank with adapters "0", "1", ...: ``cores_for`` and ``own_for`` of these seeds."""
    bank = tcur.AdapterBank(model, modules=MODULES, **options)
    exact = make() if next(model.parameters()).dtype != torch.float64 else model  # other dtypes draw other numbers
    bank.add_all({str(at): cores_for(exact, at) | own_for(at) for at in range(number)})
    return bank


def inputs(samples: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def one(seed: int, x: Tensor, form: str = "coupled") -> Tensor:
    """What one adapter computes by itself, -1 for the base."""
    return plain()(x) if seed < 0 else trained(seed, form)(x)


def each(adapters: list[int], x: Tensor, form: str = "coupled") -> Tensor:
    return torch.cat([one(at, x[i : i + 1], form) for i, at in enumerate(adapters)])
