"""Memory and communication of each of N processes (ranks) in a training step, counted from a plan and shapes alone.

"ddp"    Every rank has the whole frozen base. A step all-reduces the gradients of the trained parameters.
"fsdp"   The base is sharded: a rank has 1/N of it. It gathers every block once in forward and once in backward, and
         the parameters outside the blocks (embeddings, output layer) once. :func:`tcurlora_ext.shard` also shards the
         cores and gathers them once. LoRA's factors are in the blocks and are gathered with them, twice.
Both     Frozen tensors have no gradient to send. Frozen factors C and R are whole on every rank.

In a ring, a rank receives (N-1)/N of what is gathered, or reduced and scattered; an all-reduce is both. Trained
parameters are held and sent in float32, or in float64 where the model's dtype is. Times are these counts divided by
rates that the caller gives. They are estimates, without latency, attention scores and layers that are not adapted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from torch import nn

from tcurlora_ext.io.table import text_table

from .plan import Cost, Plan

_BLOCK = re.compile(r"(?:.*?\.)??\d+\.")
_ADAM = 2  # running means per trained parameter
_IN_MIB = ("base", "gathered", "factors", "trained", "saved", "weights", "gradients")


@dataclass(frozen=True)
class Rates:
    """The speed of one rank: FLOPs per second, and bytes that it receives per second; None where it is not known."""

    flops: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        for name, rate in zip(("flops", "bandwidth"), astuple(self), strict=True):
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} is {rate}, expected a positive number per second")


@dataclass(frozen=True)
class RankCost:
    """The cost of one method in one layout, in bytes per rank in a training step.

    Attributes:
        method: "tcur" or "lora".
        layout: "ddp" or "fsdp".
        ranks: N, the number of processes.
        base: Frozen weights that the rank has all the time.
        gathered: The largest amount of frozen weights gathered in addition: those outside the blocks, and the two
            largest blocks, one in use and one being gathered.
        factors: Frozen factors C and R, whole on every rank.
        trained: Trained parameters, their gradients and Adam's running means.
        saved: Tensors that the method saves from forward to backward.
        weights: Received for gathering weights.
        gradients: Received for reducing gradients.
        compute_s: Seconds of computing at the given rate; None without one.
        transfer_s: Seconds of communication at the given rate; None without one. A step takes the larger of the two
            times where communication overlaps with computing, and their sum where it does not.
    """

    method: str
    layout: str
    ranks: int
    base: int
    gathered: int
    factors: int
    trained: int
    saved: int
    weights: int
    gradients: int
    compute_s: float | None
    transfer_s: float | None


def rank_costs(
    model: nn.Module, plan: Plan, ranks: int, rates: Rates | None = None, dtype: torch.dtype | None = None
) -> list[RankCost]:
    """The costs of tCUR and LoRA with DDP and with FSDP on ``ranks`` processes, each with the plan's tokens.

    Args:
        model: The plan's model; it may be on the meta device.
        plan: The cost on one process.
        ranks: N, the number of processes.
        rates: The speed of a rank, for times; None: no times.
        dtype: The dtype of the frozen weights, as for the plan; None: their own.

    Raises:
        ValueError: ``ranks`` is less than one.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}, expected a positive whole number")
    blocks, outside = _bytes_by_block(model, dtype)
    base = sum(blocks.values()) + outside
    largest = sum(sorted(blocks.values())[-2:])
    wide = max(4, getattr(torch, plan.dtype).itemsize)
    found = []
    for method, cost, gathers in (("tcur", plan.tcur, 1), ("lora", plan.lora, 2)):
        trains = cost.trained * wide
        for layout in ("ddp", "fsdp"):
            spread = layout == "fsdp"
            share = ranks if spread else 1
            weights = _received(2 * (base - outside) + outside + gathers * trains, ranks) if spread else 0
            gradients = _received(trains if spread else 2 * trains, ranks)
            compute_s, transfer_s = _seconds(plan.base + cost, weights + gradients, rates or Rates())
            found.append(
                RankCost(
                    method, layout, ranks,
                    base=_part(base, share),
                    gathered=outside + largest if spread else 0,
                    factors=cost.factors,
                    trained=_part((2 + _ADAM) * trains, share),
                    saved=cost.saved,
                    weights=weights, gradients=gradients, compute_s=compute_s, transfer_s=transfer_s,
                )
            )  # fmt: skip
    return found


def rank_rows(costs: Sequence[RankCost]) -> list[dict[str, Any]]:
    """The costs as one dict each."""
    return [asdict(cost) for cost in costs]


def rank_table(costs: Sequence[RankCost]) -> list[list[str]]:
    """A line of headings, then one line per method and layout, formatted for reading; times only where known."""
    shown = [f.name for f in fields(RankCost) if any(getattr(cost, f.name) is not None for cost in costs)]
    heads = {name: f"{name} MiB" for name in _IN_MIB} | {"compute_s": "compute s", "transfer_s": "transfer s"}
    return [[heads.get(name, name) for name in shown]] + [
        [_cell(name, getattr(cost, name)) for name in shown] for cost in costs
    ]


def rank_text(costs: Sequence[RankCost]) -> str:
    """:func:`rank_table` as text."""
    header, *lines = rank_table(costs)
    return text_table(header, lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in _IN_MIB:
        return f"{value / 2**20:,.2f}"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def _bytes_by_block(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, int], int]:
    """Bytes of every block, by the path up to the first number in a parameter's name; and bytes outside blocks."""
    blocks: dict[str, int] = {}
    outside = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * (dtype or parameter.dtype).itemsize
        block = _BLOCK.match(name)
        if block:
            blocks[block[0]] = blocks.get(block[0], 0) + size
        else:
            outside += size
    return blocks, outside


def _received(size: int, ranks: int) -> int:
    """Bytes that a rank receives when ``size`` bytes are gathered, or reduced and scattered."""
    return size * (ranks - 1) // ranks


def _part(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _seconds(cost: Cost, received: int, rates: Rates) -> tuple[float | None, float | None]:
    compute = None if rates.flops is None else (cost.forward + cost.backward) / rates.flops
    return compute, None if rates.bytes is None else received / rates.bytes
