"""Trains a small adapted network for thousands of steps: its memory stays, and its loss stays finite.

    python tests/soak/long_training.py 10000       # number of steps

The resident set of the process is read from /proc every 500 steps. After the first 1,000 steps it may grow by 8 MiB:
1 KiB that stays in each of 9,000 steps would be more. A shorter trial reads it ten times, and compares with the middle.
The exit code is 1 where memory grows by more, a loss is not finite or the loss does not fall.
"""

from __future__ import annotations

import argparse
import math
import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import tcurlora_ext as tcur

Network: Callable[..., nn.Module] = runpy.run_path(str(Path(__file__).parents[1] / "adapter" / "conftest.py"))[
    "Network"
]

BOUND = 8 * 2**20  # bytes
EVERY, SETTLED = 500, 1000  # steps


def resident() -> int:
    """The bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(steps: int, keep: Callable[[torch.Tensor], object] = id) -> tuple[list[float], dict[int, int]]:
    """The losses of all steps, and the resident set by the number of steps done.

    Args:
        steps: How many.
        keep: Called with every step's output.
    """
    torch.manual_seed(0)
    model = tcur.inject(Network(width=32), tcur.TCURConfig(rank=4, dropout=0.1))
    tcur.unfreeze(model, ["head", "norm"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    teacher = torch.randn(6, 3)
    losses, sizes = [], {}
    every = min(EVERY, max(1, steps // 10))
    for step in range(1, steps + 1):
        x = torch.randn(8, 5, 6)
        y = model(x)
        loss = nn.functional.mse_loss(y, torch.tanh(x @ teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        keep(y)
        if step % every == 0:
            sizes[step] = resident()
    return losses, sizes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int, metavar="STEPS", help="how many training steps, 10 or more")
    steps = parser.parse_args(arguments).steps
    if steps < 10:
        parser.error(f"STEPS is {steps}, expected 10 or more")
    losses, sizes = train(steps)
    return judge(losses, sizes)


def judge(losses: list[float], sizes: dict[int, int]) -> int:
    """Print the line of figures; 1 where memory has grown or a loss is not finite."""
    steps = len(losses)
    settled = min(SETTLED, steps // 2)
    start, *later = (size for step, size in sizes.items() if step >= settled)
    growth = max(later) - start
    broken = sum(not math.isfinite(loss) for loss in losses)
    tenth = max(1, steps // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(
        f"{steps} steps: memory {start / 2**20:.1f} MiB, largest growth after step {settled} {growth / 2**20:.2f} MiB "
        f"(bound {BOUND / 2**20:.0f}), loss {first:.3f} to {last:.3f}, {broken} losses not finite"
    )
    return int(growth > BOUND or broken > 0 or not last < first)


if __name__ == "__main__":
    raise SystemExit(main())
