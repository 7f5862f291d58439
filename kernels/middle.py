"""The core in the form that the kernels need: u in float32, the phases, and tilings by whole groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tcurlora_ext.maths.middle import MiddleBlocks
from tcurlora_ext.maths.transforms import with_middle_product

# The most columns of a tile that holds one group: at 128 its accumulators and u would not fit into the registers.
WIDEST_GROUP = 64


class Tiling(NamedTuple):
    """A tile of whole groups: their number, and powers of two not below its columns of m, of h, and of one group."""

    groups: int
    block_c: int
    block_r: int
    block_g: int


@lru_cache(maxsize=256)
def phase_table(slices: int, transform: str, device: torch.device) -> Tensor:
    """Phases (S slices, groups, 2) float32: w cos and w sin for a pair, w (+-1)^l and 0 for a single block."""
    with torch.inference_mode(False), torch.device("cpu"):
        ones = torch.zeros(slices, 1, 1, dtype=torch.float64)
        along = with_middle_product(transform)
        ones[along.single_blocks(slices)] = 1.0
        ones[along.pair_blocks(slices)][::2] = 1.0  # for u = 1 + 0i the blocks of B are the phases
        blocks = MiddleBlocks(ones, 0, slices, transform)
        alone = torch.stack([blocks.single[..., 0, 0], torch.zeros_like(blocks.single[..., 0, 0])], -1)
        pairs = blocks.pair[..., :, 0]
        table = torch.cat([alone[:, :1], pairs, alone[:, 1:]], 1)
        return table.to(device=device, dtype=torch.float32).contiguous()


def power_of_two(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())  # 16 is the smallest size that tl.dot accepts


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
        """The number of columns of h or of m, whichever is larger."""
        return self.slices * max(self.c, self.r)

    @property
    def fits_a_tile(self) -> bool:
        return self._columns(1, max(self.c, self.r)) <= WIDEST_GROUP

    def _columns(self, groups: int, width: int) -> int:
        """The columns of a tile of groups with blocks ``width`` wide that is loaded from a multiple of 8."""
        return groups * self.halves * width + (7 if width % 8 else 0)

    def tiling(self, block_q: int) -> Tiling:
        """The tiling with as many whole groups as fit into ``block_q`` columns, at least one, at most all."""
        widest = max(self.c, self.r)
        room = block_q - self._columns(0, widest)
        groups = min(max(room // (self.halves * widest), 1), self.groups)
        return self._tiling(groups, self._columns(groups, self.c), self._columns(groups, self.r))

    def whole(self) -> Tiling:
        """The tiling with all groups in one tile that is loaded from column 0."""
        return self._tiling(self.groups, self.slices * self.c, self.slices * self.r)

    def _tiling(self, groups: int, columns_c: int, columns_r: int) -> Tiling:
        return Tiling(groups, power_of_two(columns_c), power_of_two(columns_r), power_of_two(self.halves * self.r))
