"""The network that every process builds, how it is trained, and how results are compared with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint as recompute

from ..entries import ENTRIES, Entry

WIDTH, DEPTH, BATCH = 8, 3, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "out_proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"linear1": nn.Linear(WIDTH, 2 * WIDTH), "linear2": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["out_proj"](torch.softmax(q @ k.mT, -1) @ v)
        return x + self.mlp["linear2"](torch.tanh(self.mlp["linear1"](x)))


class Network(nn.Module):
    """Stacks 8x8 (q, k, v, out; S=12), 16x8 (S=3), 8x16 (S=3)."""

    def __init__(self, recomputes: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3)
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = recompute(block, x, use_reentrant=False) if self.recomputes else block(x)
        return self.head(x)


def base(dtype: torch.dtype = torch.float32, recomputes: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(recomputes).to(dtype)


def adapted(
    entry: Entry = ENTRIES["inject"],
    head: str | None = "head",
    dtype: torch.dtype = torch.float32,
    recomputes: bool = False,
    **options: Any,
) -> Network:
    """An adapted network, the same in every process, with nonzero cores; for PEFT a PeftModel with the same blocks."""
    model: Any = entry.adapt(base(dtype, recomputes), head, rank=2, **options)
    for stack in entry.stacks(model).values():
        stack.set_core_slices(0.3 * torch.randn(stack.core.shape))
    return model


def batches(count: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """Global batches, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, y = torch.randn(BATCH, 5, 6, generator=generator), torch.randn(BATCH, 5, 3, generator=generator)
        yield x.to(dtype), y.to(dtype)


def mine(x: Tensor) -> Tensor:
    """This process's part of a global batch."""
    return x.chunk(distributed.get_world_size())[distributed.get_rank()]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).float().square().mean()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=0.05)


def fit(
    model: nn.Module, steps: int, share: Callable[[Tensor], Tensor], opt: Any = None, accumulate: Any = None
) -> Any:
    """Train on global batches, of which this process has its ``share``, with gradient clipping as trainers have it."""
    opt = opt or optimizer(model)
    for at, (x, y) in enumerate(batches(steps)):
        skip = accumulate is not None and at % 2 == 0
        with accumulate() if skip else nullcontext():
            loss(model, share(x), share(y)).backward()
        if not skip:
            torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0)
            opt.step()
            opt.zero_grad()
    return opt


def assert_gradients_are_of_one_process(model: nn.Module, single: nn.Module, rtol: float = 1e-4) -> None:
    expected = trained(single)
    assert trained(model).keys() == expected.keys()
    for name, parameter in trained(model).items():
        found, right = full(parameter.grad).float(), expected[name].grad.float()
        assert right.norm() > 0, name
        assert float((found - right).norm() / right.norm()) < rtol, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def assert_same_numbers(model: nn.Module, single: nn.Module) -> None:
    """The trained parameters are those of one process, with the same bits in every process."""
    expected = trained(single)
    for name, parameter in trained(model).items():
        found = full(parameter.detach())
        assert_close(found, expected[name].detach(), rtol=1e-4, atol=1e-5, msg=name)
        assert_same_everywhere(found, name)


def assert_same_everywhere(found: Tensor, name: str) -> None:
    """Every process has the same bits."""
    others = [torch.empty_like(found) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, found.contiguous())
    assert all(torch.equal(other, found) for other in others), name


def assert_steps_are_those_of_one_process(entry: Entry, model: nn.Module, accumulate: Any = None) -> None:
    """``accumulate`` returns the context of steps that only add to the gradients."""
    single = adapted(entry)
    fit(single, 4, lambda x: x, accumulate=accumulate and nullcontext)
    fit(model, 4, mine, accumulate=accumulate)
    assert_same_numbers(model, single)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(next(batches(1))[0])
