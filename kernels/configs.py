"""Tile sizes: a frozen table per GPU and a fallback, chosen by kernel, dtype and number of tokens. Nothing is tuned here.

No entry is measured yet. ``basis`` of an entry says what it rests on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

KERNELS = ("project", "project_back", "expand", "expand_back", "fused", "core_gradient")
BY_COUNT = "not measured: chosen by count"


@dataclass(frozen=True)
class Config:
    """Sizes of one kernel; what a kernel does not use is 0.

    ``block_q`` is the widest tile of whole groups in virtual columns: a tile holds as many groups as fit, at least one.
    ``programs`` are the programs per multiprocessor of a persistent grid, ``band`` the rows of tiles that share L2.
    """

    block_m: int
    block_n: int
    block_k: int
    block_q: int
    num_warps: int
    num_stages: int
    programs: int = 0
    band: int = 0
    basis: str = field(default=BY_COUNT, compare=False)


# The largest number of tokens an entry is for, None for all the rest.
Rules = tuple[tuple[int | None, Config], ...]


@dataclass(frozen=True)
class Table:
    """``rules[kernel, bytes of the dtype]`` for ``KERNELS``; fused is the same in both directions.

    ``fused_q`` and ``fused_flops`` limit the kernels of one launch: all groups in that many virtual columns, and no more
    than that many FLOPs for the h (or p) that every tile of columns computes again.
    """

    rules: dict[tuple[str, int], Rules]
    fused_q: int = 128
    fused_flops: float = 1e10  # 2e10 a ms at 20 % of an H100's bf16 peak: what two launches and their round trips cost

    def config(self, kernel: str, dtype: torch.dtype, tokens: int) -> Config:
        for limit, config in self.rules[kernel, dtype.itemsize]:
            if limit is None or tokens <= limit:
                return config
        raise AssertionError(f"no rule for {kernel} of {dtype} at {tokens} tokens")

    def configs(self, kernel: str, itemsize: int) -> list[Config]:
        """Every configuration of a kernel, once."""
        return list(dict.fromkeys(config for _, config in self.rules[kernel, itemsize]))


# float32 in ieee precision runs on the CUDA cores: accumulators and operands of a tile are registers, so tiles are small.
_FLOAT32: dict[tuple[str, int], Rules] = {
    ("project", 4): ((None, Config(32, 0, 32, 64, 8, 3)),),
    ("project_back", 4): ((None, Config(32, 0, 32, 64, 8, 3)),),
    ("expand", 4): ((None, Config(64, 64, 32, 0, 8, 3, programs=2, band=8)),),
    ("expand_back", 4): ((None, Config(64, 64, 32, 0, 8, 3, programs=2, band=8)),),
    ("fused", 4): ((None, Config(32, 32, 16, 64, 8, 3)),),
    ("core_gradient", 4): ((None, Config(32, 0, 0, 64, 8, 3)),),
}

# At most 99 KiB of shared memory, which every GPU since compute capability 8.0 gives a program.
FALLBACK = Table(
    {
        ("project", 2): ((None, Config(64, 0, 64, 64, 4, 3)),),
        ("project_back", 2): ((None, Config(64, 0, 64, 64, 4, 3)),),
        ("expand", 2): ((None, Config(128, 128, 32, 0, 8, 4, programs=1, band=8)),),
        ("expand_back", 2): ((None, Config(128, 128, 32, 0, 8, 4, programs=1, band=8)),),
        ("fused", 2): ((None, Config(64, 128, 32, 128, 8, 3)),),
        ("core_gradient", 2): ((None, Config(64, 0, 0, 64, 4, 3)),),
        **_FLOAT32,
    }
)

# 132 multiprocessors: UNETR's 2,048 tokens are 32 tiles of 64 rows, times the 7 tiles of 4 groups of q = 384; tiles twice
# as high or wide would leave half of them idle. The wide product takes the tile with the most reuse that fills them.
_HOPPER = Table(
    {
        ("project", 2): ((4096, Config(64, 0, 64, 64, 4, 4)), (None, Config(128, 0, 64, 128, 8, 3))),
        ("project_back", 2): ((4096, Config(64, 0, 64, 64, 4, 4)), (None, Config(64, 0, 32, 128, 8, 4))),
        ("expand", 2): (
            (1024, Config(64, 128, 64, 0, 4, 4, programs=2, band=8)),
            (None, Config(128, 256, 64, 0, 8, 3, programs=1, band=8)),
        ),
        ("expand_back", 2): (
            (1024, Config(64, 128, 64, 0, 4, 4, programs=2, band=8)),
            (None, Config(128, 128, 64, 0, 8, 3, programs=2, band=8)),
        ),
        ("fused", 2): ((1024, Config(64, 128, 64, 128, 8, 3)), (None, Config(64, 256, 32, 128, 8, 4))),
        ("core_gradient", 2): ((None, Config(64, 0, 0, 64, 4, 4)),),
        **_FLOAT32,
    }
)

# By torch.cuda.get_device_name().
TABLES: dict[str, Table] = {
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
}


def table_for(gpu: str) -> Table:
    """The table of a GPU by its name; the fallback for one that is not known."""
    return TABLES.get(gpu, FALLBACK)
