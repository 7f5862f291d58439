"""Which tokens of a batch have which adapter: in order, and as blocks of equally many tokens for a batched product."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# Runs of at least so many tokens of one adapter are blocks as they lie in memory; shorter ones are sorted by adapter.
RUN = 8
# The sizes of blocks of sorted tokens. A block costs as much as about OVERHEAD further tokens, for its core's reading.
SIZES = (1, 2, 4, 8, 16, 32, 64)
OVERHEAD = 4


class TokenPlan:
    """The tokens of a batch and their adapters. What a form of the product needs of them is computed when it asks.

    Args:
        owners: The adapter of each run of tokens, (runs,) int64 on the CPU: its index among the ``adapters`` adapters
            of the batch, or -1 for the base.
        run: How many consecutive tokens a run has.
        adapters: D, the number of different adapters.
        device: Where the tokens are.
    """

    def __init__(self, owners: Tensor, run: int, adapters: int, device: torch.device) -> None:
        self._owners, self._run, self._adapters, self._device = owners, run, adapters, device

    @cached_property
    def owners(self) -> Tensor:
        """The adapter of each token, -1 for the base: (T,) int64."""
        owners = self._owners if self._run == 1 else self._owners.repeat_interleave(self._run)
        return owners.to(self._device)

    @cached_property
    def by_adapter(self) -> tuple[Tensor, Tensor]:
        """The tokens that have an adapter, one adapter's after the other's, and where each one's end: (n,), (D,)."""
        counts = torch.bincount(self.owners + 1, minlength=self._adapters + 1)
        return torch.argsort(self.owners, stable=True)[int(counts[0]) :], counts[1:].cumsum(0)

    @cached_property
    def blocks(self) -> Blocks:
        """The tokens as blocks."""
        return Blocks(self._owners, self._run, self._adapters, self._device)


class Blocks:
    """The tokens of a batch as blocks: all tokens of a block have one adapter.

    T tokens become ``blocks`` blocks of ``size`` tokens each. Blocks of sorted tokens end with rows of zeros where an
    adapter's tokens do not fill them. Tokens of the base are in no block.

    Args:
        owners, run, adapters, device: As of :class:`TokenPlan`.

    Attributes:
        owner: The adapter of each block, (blocks,) int64.
        blocks, size: As above.
    """

    def __init__(self, owners: Tensor, run: int, adapters: int, device: torch.device) -> None:
        self._kept: Tensor | None = None
        self._positions: Tensor | None = None
        has_base = bool((owners < 0).any())
        if adapters == 1 and not has_base:
            self.blocks, self.size = 1, len(owners) * run
            owner = owners[:1]
        elif run >= RUN and not has_base:
            self.blocks, self.size = len(owners), run
            owner = owners
        else:
            owner = self._sort(owners, run, adapters, has_base, device)
        self.owner = owner.to(device)

    def _sort(self, owners: Tensor, run: int, adapters: int, has_base: bool, device: torch.device) -> Tensor:
        """Sort the runs by adapter; sets where each token goes, and returns the adapter of each block."""
        kept = torch.nonzero(owners >= 0).flatten()
        counts = torch.bincount(owners[kept], minlength=adapters)
        in_blocks = {size: -(-(counts * run) // size) for size in SIZES}
        self.size = min(SIZES, key=lambda size: int(in_blocks[size].sum()) * (size + OVERHEAD))
        per_adapter = in_blocks[self.size]
        self.blocks = int(per_adapter.sum())
        order = torch.argsort(owners[kept], stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        first = (per_adapter.cumsum(0) - per_adapter) * self.size
        within = torch.arange(run, device=owners.device)
        starts = first[owners[kept]] + rank * run
        self._positions = (starts[:, None] + within).flatten().to(device)
        if has_base:
            self._kept = (kept[:, None] * run + within).flatten().to(device)
        return torch.arange(adapters, device=owners.device).repeat_interleave(per_adapter)

    def spread(self, tokens: Tensor) -> Tensor:
        """Put tokens into their blocks: (G, T, k) -> (G*blocks, size, k)."""
        groups, _, width = tokens.shape
        if self._positions is None:
            return tokens.reshape(-1, self.size, width)
        if self._kept is not None:
            tokens = tokens.index_select(1, self._kept)
        rows = tokens.new_zeros(groups, self.blocks * self.size, width)
        return rows.index_copy_(1, self._positions, tokens).view(-1, self.size, width)

    def collect(self, blocks: Tensor, tokens: int) -> Tensor:
        """The inverse of :meth:`spread`, with zeros for tokens of the base: (G*blocks, size, k) -> (G, T, k)."""
        width = blocks.shape[-1]
        rows = blocks.reshape(-1, self.blocks * self.size, width)
        if self._positions is None:
            return rows
        rows = rows.index_select(1, self._positions)
        if self._kept is None:
            return rows
        return rows.new_zeros(len(rows), tokens, width).index_copy_(1, self._kept, rows)

    def of_blocks(self, cores: Tensor) -> Tensor:
        """The core of each block: (G, D, p, k) -> (G*blocks, p, k)."""
        return (cores if self.blocks == 1 else cores.index_select(1, self.owner)).flatten(0, 1)

    def sum_by_adapter(self, blocks: Tensor, adapters: int) -> Tensor:
        """Sum over the blocks of each adapter, always in the same order: (G*blocks, p, k) -> (G, D, p, k)."""
        parts = blocks.unflatten(0, (-1, self.blocks))
        if self.blocks == 1:
            return parts
        total = parts.new_zeros(len(parts), adapters, *parts.shape[2:])
        if parts.device.type == "cpu":  # one block after the other
            return total.index_add_(1, self.owner, parts)
        return add_sorted(total, self.owner, parts)


def add_sorted(total: Tensor, owner: Tensor, parts: Tensor) -> Tensor:
    """Add parts (G, blocks, ...) to ``total[:, owner]`` in place, always in the same order.

    On a GPU ``index_add_`` adds by atomics, in any order; ``index_put_`` sorts the indices first.
    """
    total.transpose(0, 1).index_put_((owner,), parts.transpose(0, 1), accumulate=True)
    return total
