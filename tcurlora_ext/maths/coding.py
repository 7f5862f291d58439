"""Vectors in few bits: the directions of learned factors, of which an orthonormalisation follows.

A column is rounded to odd whole numbers q in ``-(2^b - 1) .. 2^b - 1``, b bits an entry: with b = 1 its signs. The
column's scale is not stored: orthonormalising divides by it. 32 bits are float32, not rounded further.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = (1, 2, 4, 8, 16, 32)
WHOLE = 32
# The fewest that lost next to nothing (0.1 points of Dice) on embedded brains and none on hippocampus: docs/learned.md.
CODED_BITS = 2
_STEPS = 40


def rounded(columns: Tensor, bits: int) -> Tensor:
    """Round columns to b bits an entry, each with the step that turns it least.

    Args:
        columns: (n, k), floating, finite.
        bits: b, one of :data:`BITS`.

    Returns:
        (n, k): int32, odd whole numbers; float32 with 32 bits.

    Raises:
        ValueError: ``bits`` is another number.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
    if bits == WHOLE:
        return columns.float()
    limit = 2**bits - 1
    values = columns.double()
    largest = values.abs().amax(-2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    best = torch.full_like(largest, torch.inf)
    found = torch.ones_like(values, dtype=torch.int32)
    # From a step with which the largest entry is the last level down to one that cuts all but the smallest entries off.
    for part in torch.linspace(1.0, 0.1, _STEPS, dtype=torch.float64):
        unit = part * largest / limit
        level = (2 * torch.floor(values / (2 * unit)) + 1).clamp(-limit, limit)
        # What the direction loses: 1 - cos^2 of the angle between the column and its code.
        size = level.square().sum(-2, keepdim=True) * values.square().sum(-2, keepdim=True).clamp_min(1e-300)
        loss = 1 - (level * values).sum(-2, keepdim=True).square() / size
        better = loss < best
        best = torch.where(better, loss, best)
        found = torch.where(better, level.to(torch.int32), found)
    return found


def pack(levels: Tensor, bits: int) -> Tensor:
    """The bytes of levels of any shape, as :func:`rounded` returns them: (bytes,) uint8, the entries in order."""
    if bits == WHOLE:
        return levels.contiguous().flatten().view(torch.uint8)
    codes = (levels.flatten().to(torch.int32) + 2**bits - 1) // 2  # 0 .. 2^b - 1
    if bits >= 8:
        shifts = torch.arange(0, bits, 8, dtype=torch.int32)
        return ((codes[:, None] >> shifts) & 0xFF).to(torch.uint8).flatten()
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % each)).unflatten(0, (-1, each))
    shifts = bits * torch.arange(each, dtype=torch.int32)
    return (codes << shifts).sum(1).to(torch.uint8)


def decode(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack`: values of this shape, float64.

    Args:
        packed: (bytes,) uint8.
        bits: As they were packed.
        shape: That of the levels.

    Raises:
        ValueError: There are more or fewer bytes than the shape needs.
    """
    count = math.prod(shape)
    expected = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"found {packed.dtype} {tuple(packed.shape)}, expected {expected} bytes for {tuple(shape)} in {bits} bits"
        )
    if bits == WHOLE:
        return packed.clone().view(torch.float32).double().reshape(shape)
    values = packed.to(torch.int32)
    if bits >= 8:
        codes = (values.unflatten(0, (-1, bits // 8)) << torch.arange(0, bits, 8, dtype=torch.int32)).sum(1)
    else:
        shifts = bits * torch.arange(8 // bits, dtype=torch.int32)
        codes = ((values[:, None] >> shifts) & (2**bits - 1)).flatten()[:count]
    return (2 * codes - (2**bits - 1)).double().reshape(shape)
