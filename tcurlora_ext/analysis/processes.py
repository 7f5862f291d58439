"""What each of N processes (ranks) holds and receives in a training step, counted from a plan and shapes alone.

"ddp"    every rank holds the whole frozen base; a step all-reduces the gradients of what trains.
"fsdp"   the base is spread: a rank holds 1/N of it, gathers block by block in forward and again in backward, and what
         is outside the blocks (embeddings, output layer) once. :func:`tcurlora_ext.shard` also spreads the cores and
         gathers them once; LoRA's factors are in the blocks and are gathered with them, twice.
Both     frozen tensors have no gradient, so none is sent. Frozen factors C and R are whole on every rank.

A ring brings a rank (N-1)/N of what is gathered or reduced and scattered; an all-reduce is both. What trains is kept
and sent in float32 (float64 where the data are). Times are these counts over rates that the caller gives: an estimate,
without latency, attention scores, or layers that are not adapted.
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
_ADAM = 2  # running means a trained number
_IN_MIB = ("base", "gathered", "factors", "trained", "saved", "weights", "gradients")


@dataclass(frozen=True)
class Rates:
    """What one rank does a second: ``flops`` FLOPs, and ``bytes`` that it receives. None where it is not known."""

    flops: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        for name, rate in zip(("flops", "bandwidth"), astuple(self), strict=True):
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} is {rate}, expected a positive number a second")


@dataclass(frozen=True)
class RankCost:
    """One method in one layout; bytes a rank, for a step.

    base        frozen weights at rest
    gathered    frozen weights at most gathered beside: those outside the blocks and the two largest blocks, one in use
                and one on its way
    factors     frozen factors C and R, of which every rank has all
    trained     trained numbers, their gradients and Adam's means
    saved       kept from forward to backward by the method
    weights     received to have the weights
    gradients   received to have the sum of the gradients
    compute_s, transfer_s   seconds by the given rates, None without. A step takes the larger of them where transfers
                hide behind computing, the sum where they do not.
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
    """tCUR and LoRA, by DDP and by FSDP, on ``ranks`` processes of which each has the plan's tokens.

    ``model`` and ``dtype`` (of the frozen weights; default: their own) are those of the plan; the model may be on the
    meta device. Raises ValueError for less than one rank.
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
    """Plain records of the same."""
    return [asdict(cost) for cost in costs]


def rank_table(costs: Sequence[RankCost]) -> list[list[str]]:
    """Headings, then a line a method and layout, formatted for reading; times only where there are any."""
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
    """Bytes of every block, by the path up to the first number in a parameter's name, and of all others."""
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
    """Bytes that reach a rank when ``size`` bytes are gathered, or reduced and scattered."""
    return size * (ranks - 1) // ranks


def _part(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _seconds(cost: Cost, received: int, rates: Rates) -> tuple[float | None, float | None]:
    compute = None if rates.flops is None else (cost.forward + cost.backward) / rates.flops
    return compute, None if rates.bytes is None else received / rates.bytes
