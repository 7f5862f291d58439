"""One function per kernel: its arguments, grid and configuration as a :class:`Launch`.

Shapes: x (T, in), g (T, n*out), weight (n*out, in), col (out, c*S), row (r*S, in), h and dh (T, r*S), m and p (n, T,
c*S). Each row of x, g, col, row, h, dh, m, p is contiguous (last stride 1), with any stride between rows; the weight
may have any strides. With ``descriptors`` tiles are loaded through tensor descriptors, for operands that are
:func:`describable`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config
from .core_gradient import partial_gradient, reduce_gradient
from .expand import expand
from .fused import fused, fused_back
from .middle import Middle
from .project import project, project_back


@dataclass(frozen=True)
class Launch:
    """A kernel call, to be prepared for many runs, or compiled on a machine without a GPU."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the arguments; fused multiply-adds by name, as its default is about to change."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# A tile has at most 256 rows, and offsets within it are 32 bits wide.
LONGEST_STRIDE = 2**22


def aligned(*tensors: Tensor) -> bool:
    """Whether the tensors can be loaded 16 bytes at a time: base addresses and row strides are multiples of 16 bytes.

    Raises ValueError for strides that are too large for the kernels' offsets.
    """
    for t in tensors:
        if max(t.stride()) > LONGEST_STRIDE:
            raise ValueError(
                f"a tensor {tuple(t.shape)} has strides {t.stride()}, the Triton kernels take at most "
                f"{LONGEST_STRIDE:,}; use backend='eager'"
            )
    return all(
        min(t.stride()) <= 1 and max(t.stride()) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        for t in tensors
    )


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can address the tensors: 16-byte aligned bases and row strides, 32-bit sizes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) > 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and 0 < t.shape[0] < 2**31
        and 0 < t.shape[1] < 2**31
        for t in tensors
    )


def _operand(tensor: Tensor, rows: int, columns: int, descriptors: bool) -> Any:
    """The tensor, or a descriptor of its tiles, for which leading dimensions count as rows."""
    if not descriptors:
        return tensor
    shape = [tensor.shape[:-1].numel(), tensor.shape[-1]]
    return TensorDescriptor(tensor, shape, [tensor.stride(-2), 1], [rows, columns])


def _groups(middle: Middle) -> dict[str, Any]:
    return {"C": middle.c, "R": middle.r, "HALVES": middle.halves}


def _middle(middle: Middle) -> dict[str, Any]:
    return {
        "core": middle.core, "phases": middle.phases, "slices": middle.slices, "num_slices": middle.num_slices,
        "first_slice": middle.first_slice, "scale": middle.scale,
    }  # fmt: skip


def project_launch(
    x: Tensor, row: Tensor, middle: Middle, h: Tensor, m: Tensor, config: Config, precision: str, descriptors: bool
) -> Launch:
    """The launch that writes h = x row^T and m = scale h B^T into ``h`` and ``m``."""
    tiling = middle.tiling(config.block_q)
    bm, bk = config.block_m, config.block_k
    arguments = {
        "x": _operand(x, bm, bk, descriptors), "row": _operand(row, tiling.block_r, bk, descriptors),
        "h": h, "m": m, "tokens": x.shape[0], "in_features": x.shape[1], **_middle(middle),
        "x_stride": x.stride(0), "row_stride": row.stride(0), "h_stride": h.stride(0), "m_stride": m.stride(1),
    }  # fmt: skip
    constants = {
        **_groups(middle), "GROUPS": tiling.groups, "BLOCK_M": bm, "BLOCK_K": bk, "BLOCK_C": tiling.block_c,
        "BLOCK_R": tiling.block_r, "BLOCK_G": tiling.block_g, "PRECISION": precision, "DESCRIPTORS": descriptors,
    }  # fmt: skip
    programs = triton.cdiv(middle.groups, tiling.groups) * triton.cdiv(x.shape[0], bm)
    return Launch(project, programs, arguments, constants, config.num_warps, config.num_stages)


def project_back_launch(
    g: Tensor, col: Tensor, middle: Middle, p: Tensor, dh: Tensor, config: Config, precision: str, descriptors: bool
) -> Launch:
    """The launch that writes p = g col and dh = scale sum_j p_j B_j into ``p`` and ``dh``."""
    tiling = middle.tiling(config.block_q)
    bm, bk = config.block_m, config.block_k
    arguments = {
        "g": _operand(g, bm, bk, descriptors), "col": _operand(col, bk, tiling.block_c, descriptors),
        "p": p, "dh": dh, "tokens": g.shape[0], "out_features": col.shape[0], **_middle(middle),
        "g_stride": g.stride(0), "col_stride": col.stride(0), "p_stride": p.stride(1), "dh_stride": dh.stride(0),
    }  # fmt: skip
    constants = {
        **_groups(middle), "GROUPS": tiling.groups, "BLOCK_M": bm, "BLOCK_K": bk, "BLOCK_C": tiling.block_c,
        "BLOCK_R": tiling.block_r, "BLOCK_G": tiling.block_g, "PRECISION": precision, "DESCRIPTORS": descriptors,
    }  # fmt: skip
    programs = triton.cdiv(middle.groups, tiling.groups) * triton.cdiv(g.shape[0], bm)
    return Launch(project_back, programs, arguments, constants, config.num_warps, config.num_stages)


def expand_launch(
    a: Tensor, weight: Tensor, inner: Tensor, factor: Tensor, bias: Tensor | None, result: Tensor, num_slices: int,
    backward: bool, config: Config, precision: str, descriptors: bool, multiprocessors: int,
) -> Launch:  # fmt: skip
    """The launch of result = [x, m] [W, col]^T + bias, or backward [g, dh] [W; row].

    ``inner`` is m (n, T, q), or backward dh (T, q).
    """
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    rows, columns = (bk, bn) if backward else (bn, bk)
    width = result.shape[1] // num_slices
    arguments = {
        "a": _operand(a, bm, bk, descriptors), "b": _operand(weight, rows, columns, descriptors),
        "inner": _operand(inner, bm, bk, descriptors), "factor": _operand(factor, rows, columns, descriptors),
        "bias": bias, "result": result, "tokens": a.shape[0], "width": width, "depth": a.shape[1],
        "inner_depth": inner.shape[-1], "num_slices": num_slices, "a_stride": a.stride(0),
        "b_row_stride": weight.stride(0), "b_column_stride": weight.stride(1), "inner_stride": inner.stride(-2),
        "factor_stride": factor.stride(0), "result_stride": result.stride(0),
    }  # fmt: skip
    constants = {
        "BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "BAND": config.band, "BACKWARD": backward,
        "HAS_BIAS": bias is not None, "PRECISION": precision, "DESCRIPTORS": descriptors,
    }  # fmt: skip
    tiles = triton.cdiv(a.shape[0], bm) * triton.cdiv(width, bn) * num_slices
    programs = min(tiles, multiprocessors * config.programs)
    return Launch(expand, programs, arguments, constants, config.num_warps, config.num_stages)


def fused_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, row: Tensor, col: Tensor, middle: Middle, h: Tensor, y: Tensor,
    config: Config, precision: str, descriptors: bool,
) -> Launch:  # fmt: skip
    """The launch that computes h and y at once, for a layer whose groups fit into one tile."""
    tiling = middle.whole()
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    out = col.shape[0]
    arguments = {
        "x": _operand(x, bm, bk, descriptors), "weight": _operand(weight, bn, bk, descriptors), "bias": bias,
        "row": _operand(row, tiling.block_r, bk, descriptors), "col": _operand(col, bn, tiling.block_c, descriptors),
        "h": h, "y": y, "tokens": x.shape[0], "in_features": x.shape[1], "out_features": out, **_middle(middle),
        "x_stride": x.stride(0), "weight_row_stride": weight.stride(0), "weight_column_stride": weight.stride(1),
        "row_stride": row.stride(0), "col_stride": col.stride(0), "h_stride": h.stride(0), "y_stride": y.stride(0),
    }  # fmt: skip
    constants = {
        **_groups(middle), "GROUPS": tiling.groups, "BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk,
        "BLOCK_C": tiling.block_c, "BLOCK_R": tiling.block_r, "BLOCK_G": tiling.block_g, "HAS_BIAS": bias is not None,
        "PRECISION": precision, "DESCRIPTORS": descriptors,
    }  # fmt: skip
    programs = triton.cdiv(x.shape[0], bm) * triton.cdiv(out, bn) * middle.num_slices
    return Launch(fused, programs, arguments, constants, config.num_warps, config.num_stages)


def fused_back_launch(
    g: Tensor, weight: Tensor, row: Tensor, col: Tensor, middle: Middle, p: Tensor, dx: Tensor,
    config: Config, precision: str, descriptors: bool,
) -> Launch:  # fmt: skip
    """The launch that computes p and dx at once, for a layer whose groups fit into one tile."""
    tiling = middle.whole()
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    arguments = {
        "g": _operand(g, bm, bk, descriptors), "weight": _operand(weight, bk, bn, descriptors),
        "row": _operand(row, tiling.block_r, bn, descriptors), "col": _operand(col, bk, tiling.block_c, descriptors),
        "p": p, "dx": dx, "tokens": g.shape[0], "in_features": row.shape[1], "out_features": col.shape[0],
        **_middle(middle), "g_stride": g.stride(0), "weight_row_stride": weight.stride(0),
        "weight_column_stride": weight.stride(1), "row_stride": row.stride(0), "col_stride": col.stride(0),
        "p_stride": p.stride(1), "dx_stride": dx.stride(0),
    }  # fmt: skip
    constants = {
        **_groups(middle), "GROUPS": tiling.groups, "BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk,
        "BLOCK_C": tiling.block_c, "BLOCK_R": tiling.block_r, "BLOCK_G": tiling.block_g,
        "PRECISION": precision, "DESCRIPTORS": descriptors,
    }  # fmt: skip
    programs = triton.cdiv(g.shape[0], bm) * triton.cdiv(row.shape[1], bn)
    return Launch(fused_back, programs, arguments, constants, config.num_warps, config.num_stages)


def chunk_rows(tokens: int, block: int) -> int:
    """The number of tokens that one program of stage 1 sums: at least 256, and enough for at most 32 chunks."""
    return triton.cdiv(max(256, triton.cdiv(tokens, 32)), block) * block


def core_gradient_workspace(middle: Middle, tokens: int, config: Config) -> tuple[int, ...]:
    """The shape of the sums over chunks of tokens, float32, between the stages of the core's gradient."""
    chunks = triton.cdiv(tokens, chunk_rows(tokens, config.block_m))
    return (chunks, middle.num_slices, middle.groups, middle.halves * middle.c, middle.halves * middle.r)


def core_gradient_launches(
    p: Tensor, h: Tensor, middle: Middle, workspace: Tensor, gradient: Tensor, config: Config, precision: str
) -> tuple[Launch, Launch]:
    """The launches of both stages, which write the core's gradient (S, c, r) float32 into ``gradient``."""
    tiling = middle.tiling(config.block_q)
    tokens, chunks = h.shape[0], workspace.shape[0]
    length = chunk_rows(tokens, config.block_m)
    first = {
        "p": p, "h": h, "workspace": workspace, "tokens": tokens, "slices": middle.slices,
        "num_slices": middle.num_slices, "chunk_rows": length, "p_stride": p.stride(1), "h_stride": h.stride(0),
    }  # fmt: skip
    constants = {
        **_groups(middle), "GROUPS": tiling.groups, "BLOCK_T": config.block_m, "BLOCK_C": tiling.block_c,
        "BLOCK_R": tiling.block_r, "PRECISION": precision,
    }  # fmt: skip
    programs = triton.cdiv(middle.groups, tiling.groups) * middle.num_slices * chunks
    second = {
        "workspace": workspace, "phases": middle.phases, "gradient": gradient, "chunks": chunks,
        "slices": middle.slices, "num_slices": middle.num_slices, "first_slice": middle.first_slice,
        "scale": middle.scale,
    }  # fmt: skip
    block = min(1024, _power_of_two(middle.c * middle.r))
    return (
        Launch(partial_gradient, programs, first, constants, config.num_warps, config.num_stages),
        Launch(
            reduce_gradient, middle.groups * triton.cdiv(middle.c * middle.r, block), second,
            {**_groups(middle), "BLOCK": block}, 1 if block <= 128 else 4, 1,
        ),
    )  # fmt: skip


def _power_of_two(number: int) -> int:
    return max(32, 1 << (number - 1).bit_length())
