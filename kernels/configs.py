"""Tile sizes: a frozen table per GPU and a fallback, chosen by kernel, dtype and tokens. Nothing is tuned here.

No entry has been measured yet; the field ``basis`` of an entry says how it was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

BY_COUNT = "not measured: chosen by count"


@dataclass(frozen=True)
class Config:
    """The tile sizes of one kernel; a size that the kernel does not use is 0.

    ``block_q`` is the width of a tile of whole groups in virtual columns: it holds as many groups as fit, at least one.
    ``programs`` is the number of programs per multiprocessor in a persistent grid, ``band`` the number of rows of tiles
    that are computed together to share L2.
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


# Pairs of the largest number of tokens for which the entry is used, None for any number, and the entry.
Rules = tuple[tuple[int | None, Config], ...]

KERNELS = (
    "project", "project_back", "expand", "expand_back", "fused", "fused_back", "core_gradient", "ride", "ride_back",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """``rules[kernel, bytes of the dtype]`` for ``KERNELS``.

    The kernels ``fused`` and ``fused_back`` are used where all groups fit into ``fused_q`` columns and computing h (or
    p) again in every tile of columns takes at most ``fused_flops`` FLOPs.
    """

    rules: dict[tuple[str, int], Rules]
    fused_q: int = 128
    fused_flops: float = 1e10  # by count: 20 us at half of an H100's bf16 peak, as two launches and round trips take

    def config(self, kernel: str, dtype: torch.dtype, tokens: int) -> Config:
        for limit, config in self.rules[kernel, dtype.itemsize]:
            if limit is None or tokens <= limit:
                return config
        raise AssertionError(f"no rule for {kernel} of {dtype} at {tokens} tokens")

    def configs(self, kernel: str, itemsize: int) -> list[Config]:
        """All different configurations of a kernel."""
        return list(dict.fromkeys(config for _, config in self.rules[kernel, itemsize]))


def _always(**configs: Config) -> dict[str, Rules]:
    return {kernel: ((None, config),) for kernel, config in configs.items()}


def _of(itemsize: int, rules: dict[str, Rules]) -> dict[tuple[str, int], Rules]:
    return {(kernel, itemsize): rule for kernel, rule in rules.items()}


# float32 in ieee precision runs on the CUDA cores. Accumulators and operands of a tile are then all in registers, so
# tiles are small.
_FLOAT32 = _of(
    4,
    _always(
        project=Config(32, 0, 16, 32, 8, 3),
        project_back=Config(32, 0, 16, 32, 8, 3),
        expand=Config(64, 64, 32, 0, 8, 3, programs=2, band=8),
        expand_back=Config(32, 64, 16, 0, 8, 3, programs=2, band=8),
        fused=Config(16, 32, 16, 64, 8, 3),
        fused_back=Config(16, 32, 16, 64, 8, 3),
        core_gradient=Config(32, 0, 0, 64, 8, 3),
        ride=Config(16, 0, 32, 0, 8, 3),
        ride_back=Config(16, 0, 16, 0, 8, 3),
    ),
)

# At most 99 KiB of shared memory, which a program can have on every GPU since compute capability 8.0.
_SMALL = _always(
    project=Config(64, 0, 64, 64, 4, 3),
    project_back=Config(64, 0, 64, 64, 4, 3),
    expand=Config(128, 128, 32, 0, 8, 4, programs=1, band=8),
    expand_back=Config(128, 128, 32, 0, 8, 4, programs=1, band=8),
    fused=Config(64, 128, 32, 128, 8, 3),
    fused_back=Config(64, 128, 32, 128, 8, 3),
    core_gradient=Config(64, 0, 0, 64, 4, 3),
    ride=Config(64, 0, 64, 0, 4, 3),
    ride_back=Config(32, 0, 64, 0, 8, 3),
)
FALLBACK = Table({**_of(2, _SMALL), **_FLOAT32})

# For rows that are not 16-byte aligned (an odd width): every element is loaded by itself, with its own pointer in
# registers.
_ODD = _always(
    project=Config(64, 0, 32, 64, 8, 2),
    project_back=Config(64, 0, 32, 64, 8, 2),
    expand=Config(64, 64, 32, 0, 8, 2, programs=2, band=8),
    expand_back=Config(64, 64, 32, 0, 8, 2, programs=2, band=8),
    core_gradient=Config(32, 0, 0, 64, 8, 2),
    ride=Config(64, 0, 32, 0, 8, 2),
    ride_back=Config(32, 0, 32, 0, 8, 2),
)
_ODD_FLOAT32 = _always(
    project=Config(32, 0, 16, 64, 8, 2),
    project_back=Config(32, 0, 16, 64, 8, 2),
    expand=Config(64, 64, 16, 0, 8, 2, programs=2, band=8),
    expand_back=Config(64, 64, 16, 0, 8, 2, programs=2, band=8),
    core_gradient=Config(32, 0, 0, 64, 8, 2),
    ride=Config(16, 0, 16, 0, 16, 2),
    ride_back=Config(16, 0, 16, 0, 8, 1),
)
UNALIGNED = Table({**_of(2, _ODD), **_of(4, _ODD_FLOAT32)}, fused_q=0)

# 132 multiprocessors. UNETR's 2,048 tokens and q = 384 make 32 tiles of 64 rows times 7 tiles of 4 groups; tiles twice
# as high or wide would leave half of the multiprocessors idle. The wide product takes the tile with the most reuse that
# still uses all of them.
_HOPPER = Table(
    {
        **_of(
            2,
            {
                "project": ((4096, Config(64, 0, 64, 64, 4, 4)), (None, Config(128, 0, 64, 128, 8, 3))),
                "project_back": ((4096, Config(64, 0, 64, 64, 8, 4)), (None, Config(64, 0, 32, 128, 8, 4))),
                "expand": (
                    (1024, Config(64, 128, 64, 0, 4, 4, programs=2, band=8)),
                    (None, Config(128, 256, 64, 0, 8, 3, programs=1, band=8)),
                ),
                "expand_back": (
                    (1024, Config(64, 128, 64, 0, 4, 4, programs=2, band=8)),
                    (None, Config(128, 128, 64, 0, 8, 3, programs=2, band=8)),
                ),
                # 2,048 tokens are 128 programs, 8,192 too. Fewer than 64 rows are not for Hopper's own matrix unit.
                "ride": ((4096, Config(16, 0, 256, 0, 4, 3)), (None, Config(64, 0, 128, 0, 4, 3))),
                "ride_back": ((4096, Config(16, 0, 256, 0, 4, 3)), (None, Config(64, 0, 128, 0, 8, 3))),
                **_always(
                    fused=Config(64, 128, 64, 128, 8, 3),
                    fused_back=Config(64, 128, 32, 128, 8, 4),
                    core_gradient=Config(64, 0, 0, 64, 4, 4),
                ),
            },
        ),
        **_FLOAT32,
    }
)

# Keys are the names that torch.cuda.get_device_name() returns.
TABLES: dict[str, Table] = {
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
}


def table_for(gpu: str, aligned: bool = True) -> Table:
    """The table of a GPU by its name, or the fallback for an unknown one; for unaligned rows one table for all GPUs."""
    return TABLES.get(gpu, FALLBACK) if aligned else UNALIGNED
