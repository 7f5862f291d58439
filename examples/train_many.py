"""Train one adapter per task for many tasks at the same time, in one process, and compare with one after another.

    python examples/train_many.py                                             # 64 tasks, nothing downloaded
    python examples/train_many.py --tasks 256 --steps 100 --alone 4

A small network is first trained on a mixture of curves and then frozen. Each task is another curve, and its adapter one
core of a tcur.AdapterBank. A step of all tasks together takes a batch with samples of every task and one step of Adam;
the loss is the sum of the tasks' mean squared errors, and Adam computes each parameter alone, so that every adapter
trains as it would by itself, up to rounding. The script checks this on the final losses, in float64.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tcurlora_ext as tcur

Data = tuple[Tensor, Tensor]  # x and y, each (tasks, points, 1)
BASIS = 16  # curves of the mixture


class Curves(nn.Module):
    """From a point (N, 1) to the values of curves at it (N, outputs), by residual blocks of one width."""

    def __init__(self, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(1, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


def curves(tasks: int, points: int, seed: int) -> Data:
    """Every other task is a line, every other a sine, each with coefficients of its own; x lies in [-2, 2]."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(tasks, points, 1, generator=generator, dtype=torch.float64) - 2
    a, b, c = torch.rand(3, tasks, 1, 1, generator=generator, dtype=torch.float64)
    sine = torch.sin((1 + 2 * a) * x + 2 * math.pi * b) * (0.5 + c)
    line = (2 * a - 1) * x + (2 * b - 1)
    return x, torch.where((torch.arange(tasks) % 2 == 0)[:, None, None], line, sine)


def pretrained(options: argparse.Namespace) -> Curves:
    """The network, trained on curves that are no task's, one output each; the tasks use the first output."""
    torch.manual_seed(0)
    net = Curves(options.width, options.blocks, BASIS).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, fused=True)
    for step in range(options.pretrain_steps):
        x = 4 * torch.rand(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) - 2
        wanted = mixture(x)
        loss = (net(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def mixture(x: Tensor) -> Tensor:
    """The curves of pretraining at points (N, 1): (N, BASIS), half of them lines."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, BASIS, generator=generator, dtype=torch.float64)
    return torch.cat([((2 * a - 1) * x + 2 * b - 1)[:, ::2], torch.sin((1 + 2 * a) * x + 6 * b)[:, 1::2]], 1)


def batch(data: Data, step: int, size: int) -> Data:
    """The next `size` points of each task, from the start again after the last."""
    at = torch.arange(step * size, (step + 1) * size) % data[0].shape[1]
    return data[0][:, at], data[1][:, at]


def losses(net: nn.Module, data: Data) -> Tensor:
    """The mean squared error of each task, (tasks,); samples of a task stand one after the other."""
    x, y = data
    return (net(x.flatten(0, 1))[:, :1].view_as(y) - y).square().mean((1, 2))


def train_together(bank: tcur.AdapterBank, net: nn.Module, data: Data, options: argparse.Namespace) -> Tensor:
    """Train the bank's adapters, one per task. Returns their final losses on all points, (tasks,)."""
    optimizer = torch.optim.Adam(bank.train(bank.names), lr=options.rate, fused=True)
    for step in range(options.steps):
        with bank.use(bank.names):  # an id per task: its points stand one after the other
            loss = losses(net, batch(data, step, options.batch)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad(), bank.use(bank.names):
        return losses(net, data)


def train_alone(net: nn.Module, data: Data, options: argparse.Namespace) -> Tensor:
    """Train the network's own adapter for one task, from zero. Returns its final loss, (1,)."""
    cores = [stack.core for stack in tcur.stacks(net).values()]
    with torch.no_grad():
        for core in cores:
            core.zero_()
    optimizer = torch.optim.Adam(cores, lr=options.rate, fused=True)
    for step in range(options.steps):
        loss = losses(net, batch(data, step, options.batch)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return losses(net, data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, train in both ways, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--alone", type=int, help="train so many of the tasks one after another; default: all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="points per task and step")
    parser.add_argument("--points", type=int, default=64, help="points per task")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    options = parser.parse_args(arguments)
    number = options.tasks if options.alone is None else options.alone
    if not 1 <= number <= options.tasks:
        parser.error(f"--alone is {number}, expected 1 to {options.tasks}, the number of tasks")

    config = tcur.TCURConfig(rank=options.rank, target_modules=r"blocks\..*")
    net = tcur.inject(pretrained(options), config)
    single = copy.deepcopy(net)
    data = curves(options.tasks, options.points, seed=2)
    with torch.no_grad():
        before = losses(net, data)

    bank = tcur.AdapterBank(net)
    bank.add_all({f"task {task}": None for task in range(options.tasks)})
    start = time.perf_counter()
    together = train_together(bank, net, data, options)
    time_together = time.perf_counter() - start

    start = time.perf_counter()
    alone = torch.cat([train_alone(single, (data[0][[t]], data[1][[t]]), options) for t in range(number)])
    time_alone = (time.perf_counter() - start) * options.tasks / number

    measured = "" if number == options.tasks else f" ({number} measured, multiplied)"
    table = Table("", "time, s", "tasks per minute", "mean squared error")
    table.add_row("before", "", "", f"{before.mean():.4f}")
    for label, seconds, loss in (
        (f"all {options.tasks} together", time_together, together),
        (f"one after another{measured}", time_alone, alone),
    ):
        table.add_row(label, f"{seconds:.1f}", f"{60 * options.tasks / seconds:.0f}", f"{loss.mean():.4f}")
    Console().print(table)
    core = bank.cores("task 0")
    trained, size = sum(c.numel() for c in core.values()), sum(c.nbytes for c in core.values())
    print(f"each adapter: {trained:,} trained parameters, {size:,} bytes in float64")
    # Adam carries rounding of 1e-16 on from step to step.
    torch.testing.assert_close(together[:number], alone, rtol=1e-6, atol=1e-12)
    difference = ((together[:number] - alone).abs() / alone).max()
    print(f"final losses of {number} tasks are equal to {difference:.0e} of each: True")


if __name__ == "__main__":
    main()
