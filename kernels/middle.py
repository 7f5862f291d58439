"""What the kernels need of the core: u in float32, phases, and how whole groups fill a tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.transforms import with_middle_product

# Columns of a tile that holds one group. At 128 the accumulators and u of such a tile no longer fit the registers.
WIDEST_GROUP = 64


class Tiling(NamedTuple):
    """A tile of whole groups: how many, and the powers of two that hold its columns of m, of h, and of a group."""

    groups: int
    block_c: int
    block_r: int
    block_g: int


@lru_cache(maxsize=256)
def phase_table(slices: int, transform: str, device: torch.device) -> Tensor:
    """(S layers, groups, 2) float32: w cos and w sin of every group's phase, w (+-1)^l and 0 of a block alone."""
    with torch.inference_mode(False), torch.device("cpu"):
        ones = torch.zeros(slices, 1, 1, dtype=torch.float64)
        along = with_middle_product(transform)
        ones[along.single_blocks(slices)] = 1.0
        ones[along.pair_blocks(slices)][::2] = 1.0  # u = 1 + 0i: its blocks are the phases
        blocks = MiddleBlocks(ones, 0, slices, transform)
        alone = torch.stack([blocks.single[..., 0, 0], torch.zeros_like(blocks.single[..., 0, 0])], -1)
        pairs = blocks.pair[..., :, 0]
        table = torch.cat([alone[:, :1], pairs, alone[:, 1:]], 1)
        return table.to(device=device, dtype=torch.float32).contiguous()


def _power_of_two(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())  # 16: the least that a dot takes


@dataclass(frozen=True)
class Middle:
    """The middle product of one call. core (S, c, r) float32 contiguous, phases (S, groups, 2) float32."""

    core: Tensor
    phases: Tensor
    first_slice: int
    num_slices: int
    scale: float
    halves: int

    @classmethod
    def of(cls, core: Tensor, first_slice: int, num_slices: int, scale: float, transform: str) -> Middle:
        if transform not in ("dft", "dct"):
            raise ValueError(f"transform {transform!r} has no middle product, expected 'dft' or 'dct'")
        phases = phase_table(core.shape[0], transform, core.device)
        u = core.detach().to(torch.float32).contiguous()
        return cls(u, phases, first_slice, num_slices, float(scale), 2 if transform == "dft" else 1)

    @property
    def slices(self) -> int:
        return self.core.shape[0]

    @property
    def c(self) -> int:
        return self.core.shape[1]

    @property
    def r(self) -> int:
        return self.core.shape[2]

    @property
    def groups(self) -> int:
        return self.phases.shape[1]

    @property
    def q(self) -> int:
        """Columns of h or m, the wider of the two."""
        return self.slices * max(self.c, self.r)

    @property
    def fits_a_tile(self) -> bool:
        return self._columns(1, max(self.c, self.r)) <= WIDEST_GROUP

    def _columns(self, groups: int, width: int) -> int:
        """Of a tile of groups with blocks ``width`` wide, fetched from a multiple of 8."""
        return groups * self.halves * width + (7 if width % 8 else 0)

    def tiling(self, block_q: int) -> Tiling:
        """As many whole groups as fit ``block_q`` columns, at least one, at most all."""
        widest = max(self.c, self.r)
        room = block_q - self._columns(0, widest)
        groups = min(max(room // (self.halves * widest), 1), self.groups)
        return self._tiling(groups, self._columns(groups, self.c), self._columns(groups, self.r))

    def whole(self) -> Tiling:
        """All groups, fetched from column 0."""
        return self._tiling(self.groups, self.slices * self.c, self.slices * self.r)

    def _tiling(self, groups: int, columns_c: int, columns_r: int) -> Tiling:
        return Tiling(groups, _power_of_two(columns_c), _power_of_two(columns_r), _power_of_two(self.halves * self.r))
