"""One function per kernel of the riding form: its arguments, grid and configuration as a :class:`Launch`.

Shapes: x, changed and g (T, in), row (r*S, in), h and dh (T, r), core (S, c, r), columns and gain (c,). Rows of x, g,
row and h are contiguous (last stride 1), with any stride between rows; all else is contiguous. core and gain are
float32, columns int64.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..configs import Config
from ..launch import Launch
from ..middle import power_of_two
from .change import ride
from .change_back import reduce_chunks, ride_back

# The widest c and r: their tiles of U and of the core's gradient are in registers.
WIDEST = 64
MOST_CHUNKS = 512
REDUCED = {"BLOCK": 64, "CHUNKS": 32}  # 16 entries for each of 128 threads


def chunk_rows(tokens: int, config: Config) -> int:
    """The number of tokens that one program of ``ride_back`` takes: a block, and more beyond 512 blocks."""
    return triton.cdiv(triton.cdiv(tokens, config.block_m), MOST_CHUNKS) * config.block_m


def workspace_shape(core: Tensor, tokens: int, config: Config) -> tuple[int, ...]:
    """The shape of the core's gradient of each chunk of tokens, float32."""
    return (triton.cdiv(tokens, chunk_rows(tokens, config)), *core.shape[1:])


def _sizes(core: Tensor, config: Config, precision: str) -> dict[str, Any]:
    _, c, r = core.shape
    return {
        "C": c, "R": r, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_C": power_of_two(c),
        "BLOCK_R": power_of_two(r), "PRECISION": precision,
    }  # fmt: skip


def ride_launch(
    x: Tensor, row: Tensor, columns: Tensor, core: Tensor, gain: Tensor, slice_index: int, scale: float,
    changed: Tensor, h: Tensor, config: Config, precision: str,
) -> Launch:  # fmt: skip
    """The launch that writes x' into ``changed`` and h = x R^T into ``h``."""
    arguments = {
        "x": x, "row": row, "columns": columns, "core": core, "gain": gain, "changed": changed, "h": h,
        "tokens": x.shape[0], "features": x.shape[1], "slice_index": slice_index, "scale": scale,
        "x_stride": x.stride(0), "row_stride": row.stride(0),
    }  # fmt: skip
    programs = triton.cdiv(x.shape[0], config.block_m)
    return Launch(ride, programs, arguments, _sizes(core, config, precision), config.num_warps, config.num_stages)


def ride_back_launch(
    g: Tensor, row: Tensor, columns: Tensor, core: Tensor, gain: Tensor, slice_index: int, scale: float,
    h: Tensor | None, dh: Tensor | None, workspace: Tensor | None, needs_x: bool, config: Config, precision: str,
) -> Launch:  # fmt: skip
    """The launch that writes the sums of the chunks into ``workspace`` and dh into ``dh``, and changes g to dx.

    ``workspace``, and h with it, and ``dh`` are None where they are not needed.
    """
    length = chunk_rows(g.shape[0], config)
    arguments = {
        "g": g, "row": row, "columns": columns, "core": core, "gain": gain, "h": h, "dh": dh, "workspace": workspace,
        "tokens": g.shape[0], "features": g.shape[1], "chunk_rows": length, "slice_index": slice_index, "scale": scale,
        "g_stride": g.stride(0), "h_stride": 0 if h is None else h.stride(0), "row_stride": row.stride(0),
    }  # fmt: skip
    constants = {
        **_sizes(core, config, precision), "NEEDS_X": needs_x, "NEEDS_CORE": workspace is not None,
        "NEEDS_ROW": dh is not None, "STAGES": config.num_stages,
    }  # fmt: skip
    programs = triton.cdiv(g.shape[0], length)
    return Launch(ride_back, programs, arguments, constants, config.num_warps, config.num_stages)


def reduce_launch(workspace: Tensor, gain: Tensor, slice_index: int, scale: float, gradient: Tensor) -> Launch:
    """The launch that writes the core's gradient (S, c, r), in the dtype of ``gradient``."""
    slices, c, r = gradient.shape
    arguments = {
        "workspace": workspace, "gain": gain, "gradient": gradient, "chunks": workspace.shape[0], "slices": slices,
        "slice_index": slice_index, "scale": scale,
    }  # fmt: skip
    programs = triton.cdiv(slices * c * r, REDUCED["BLOCK"])
    return Launch(reduce_chunks, programs, arguments, {"C": c, "R": r, **REDUCED}, 4, 1)
