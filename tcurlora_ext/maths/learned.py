"""The directions of a change of weights: a subspace in which a small core can make most of it again.

For a change D of the weights of a stack, the leading left and right singular vectors at every frequency of the slice
transform (the t-SVD of D; with a core for every slice, the SVD of each slice) span the best C and R of their rank:
``C * U * R`` comes nearest to D.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .transforms import SliceTransform

# Above this, the leading vectors come from random projections with power iterations: 4096 x 11008 takes 2 s for an SVD
# of rank 8 in place of minutes. Below, the whole SVD is exact and fast enough.
WHOLE_SVD = 1024
_OVERSAMPLING, _POWER_STEPS = 16, 6


class Directions(NamedTuple):
    """The leading singular vectors of a change, as blocks of its slice transform.

    Attributes:
        left: (B, out, c), B the blocks of the stack's core.
        right: (B, in, r).
        energy: The share of the change's squared Frobenius norm that a core over these vectors can reach, 0 to 1.
        norm: The Frobenius norm of the change.
    """

    left: Tensor
    right: Tensor
    energy: float
    norm: float


def leading_directions(
    change: Tensor, rank: tuple[int, int], along: SliceTransform, frequencies: int | None = None
) -> Directions:
    """The leading singular vectors of a change of a stack's weights, largest first.

    Args:
        change: D (S, out, in), floating, finite.
        rank: (c, r).
        along: The stack's slice transform.
        frequencies: How many of the lowest frequencies the core has; None: all.

    Returns:
        Float64, on the device of the change.

    Raises:
        ValueError: D is zero, or has a lower rank than c or r at a frequency.
    """
    c, r = rank
    change = change.double()
    slices, norm = len(change), float(change.norm())
    if norm == 0:
        raise ValueError("the change is zero: it has no directions to learn")
    parts, weights = along.spectrum(change)
    parts, weights = parts[:frequencies], weights[:frequencies]
    left, right, reached = [], [], 0.0
    for at, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        U, s, V = _leading_svd(part, max(c, r))
        found = int((s > 1e-6 * s[0]).sum()) if float(s[0]) > 1e-9 * norm else 0
        if found < max(c, r):
            where = f"slice {at}" if not along.shares_core else f"frequency {at}"
            raise ValueError(f"the change has rank {found} at {where}, expected at least {max(c, r)}")
        left.append(U[:, :c])
        right.append(V[:, :r].mH)
        reached += float(weight) * float(s[: min(c, r)].square().sum())
    blocks = along.kept_blocks(slices, frequencies)
    C, R = (along.inverse_spectrum(torch.stack(vectors), slices) for vectors in (left, right))
    return Directions(along.fold(C, blocks), along.fold(R, blocks).mT.contiguous(), reached / norm**2, norm)


def _leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least the ``rank`` largest singular values (or all) with their vectors: (m, k), (k,), (n, k)."""
    if min(matrix.shape) <= max(WHOLE_SVD, rank + _OVERSAMPLING):
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, s, Vh.mH
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, rank + _OVERSAMPLING, niter=_POWER_STEPS)


def paired(blocks: Tensor, along: SliceTransform, slices: int) -> list[Tensor]:
    """The blocks (B, n, k) with the two of a pair stacked by rows: (n, k) for a single block, (2n, k) for a pair."""
    pairs = range(len(blocks))[along.pair_blocks(slices)]
    parts = {at: blocks[at] for at in range(len(blocks)) if at not in pairs}
    parts |= {at: torch.cat([blocks[at], blocks[at + 1]]) for at in pairs[::2]}
    return [parts[at] for at in sorted(parts)]


def unpaired(parts: list[Tensor], along: SliceTransform, blocks: int, slices: int) -> Tensor:
    """The inverse of :func:`paired`: (B, n, k)."""
    pairs = range(blocks)[along.pair_blocks(slices)]
    joined: list[Tensor] = []
    for part in parts:
        joined += part.chunk(2) if len(joined) in pairs else [part]
    return torch.stack(joined)
