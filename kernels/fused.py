"""A whole layer in one launch, for layers whose groups fit into one tile. Jit functions only.

A program computes one tile of the result. It needs h (or p) of its tokens for all groups, so every tile of columns
computes them again. This makes the base product's work (BLOCK_N + BLOCK_R) / BLOCK_N times as large, but saves launches
and round trips to memory. The programs of the first tile of columns store h (or p). The one tile of groups is loaded
from column 0, without padding.
"""

import triton
import triton.language as tl

from .blocks import group_columns, load_tile, middle_block, slice_start, store_tile, virtual_columns


@triton.jit(do_not_specialize=["tokens", "first_slice"])
def fused(
    x, weight, bias, row, col, core, phases, h, y,
    tokens, in_features, out_features, slices, num_slices, first_slice, scale,
    x_stride, weight_row_stride, weight_column_stride, row_stride, col_stride, h_stride, y_stride,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """y_j = x W_j^T + bias_j + m_j col^T (T, n*out) with m_j = scale h B_j^T, and h = x row^T (T, r*S).

    x, weight, row, col: pointers, or descriptors of (BLOCK_M, BLOCK_K), (BLOCK_N, BLOCK_K), (BLOCK_R, BLOCK_K) and
    (BLOCK_N, BLOCK_C).
    """
    columns_of_slice = tl.cdiv(out_features, BLOCK_N)
    across = columns_of_slice * num_slices
    token = (tl.program_id(0) // across) * BLOCK_M
    within = tl.program_id(0) % across
    j = within // columns_of_slice
    column = (within % columns_of_slice) * BLOCK_N
    weight_start = slice_start(j, out_features, DESCRIPTORS)
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h_sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        a = load_tile(x, 0, token, k, tokens, in_features, x_stride, 1, BLOCK_M, BLOCK_K, DESCRIPTORS)
        w = load_tile(
            weight, weight_start, column, k, out_features, in_features, weight_row_stride, weight_column_stride,
            BLOCK_N, BLOCK_K, DESCRIPTORS,
        )  # fmt: skip
        b = load_tile(row, 0, 0, k, slices * R, in_features, row_stride, 1, BLOCK_R, BLOCK_K, DESCRIPTORS)
        base = tl.dot(a, w.T, base, input_precision=PRECISION)
        h_sum = tl.dot(a, b.T, h_sum, input_precision=PRECISION)
    columns, inside = group_columns(0, 0, slices, R, HALVES, GROUPS, BLOCK_R)
    h_tile = tl.where(inside[None, :], h_sum, 0.0).to(h.dtype.element_ty)
    store_tile(h, h_tile, 0, token, tl.where(within == 0, tokens, 0), columns, inside, h_stride, BLOCK_M)

    o = virtual_columns(0, 0, C, HALVES, GROUPS, BLOCK_C)
    i = virtual_columns(0, 0, R, HALVES, GROUPS, BLOCK_R)
    block = middle_block(
        core, phases, o, i, 0, first_slice + j, slices, scale, C, R, HALVES, GROUPS, BLOCK_G, False, h_tile.dtype,
        PRECISION,
    )  # fmt: skip
    m_tile = tl.dot(h_tile, block, input_precision=PRECISION).to(h_tile.dtype)
    c = load_tile(
        col, 0, column, 0, out_features, slices * C, col_stride, 1,
        BLOCK_N, BLOCK_C, DESCRIPTORS,
    )  # fmt: skip
    base = tl.dot(m_tile, c.T, base, input_precision=PRECISION)
    n = column + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        base += tl.load(bias + j * out_features + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    store_tile(y, base, 0, token, tokens, j * out_features + n, n < out_features, y_stride, BLOCK_M)


@triton.jit(do_not_specialize=["tokens", "first_slice"])
def fused_back(
    g, weight, row, col, core, phases, p, dx,
    tokens, in_features, out_features, slices, num_slices, first_slice, scale,
    g_stride, weight_row_stride, weight_column_stride, row_stride, col_stride, p_stride, dx_stride,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dx = sum_j g_j W_j + (scale p_j B_j) row (T, in) and p_j = g_j col (n, T, c*S).

    g, weight, row, col: pointers, or descriptors of (BLOCK_M, BLOCK_K), (BLOCK_K, BLOCK_N), (BLOCK_R, BLOCK_N) and
    (BLOCK_K, BLOCK_C); with descriptors, out is a multiple of BLOCK_K. The part of dh of each slice is multiplied by
    row at once: a sum over the slices would take BLOCK_M x BLOCK_R more registers during the K loop.
    """
    across = tl.cdiv(in_features, BLOCK_N)
    token = (tl.program_id(0) // across) * BLOCK_M
    within = tl.program_id(0) % across
    column = within * BLOCK_N
    columns, inside = group_columns(0, 0, slices, C, HALVES, GROUPS, BLOCK_C)
    o = virtual_columns(0, 0, C, HALVES, GROUPS, BLOCK_C)
    i = virtual_columns(0, 0, R, HALVES, GROUPS, BLOCK_R)
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.range(0, num_slices, num_stages=1, disable_licm=True):
        p_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        end = (j + 1) * out_features
        for k in range(0, out_features, BLOCK_K):
            a = load_tile(g, 0, token, j * out_features + k, tokens, end, g_stride, 1, BLOCK_M, BLOCK_K, DESCRIPTORS)
            w = load_tile(
                weight, slice_start(j, out_features, DESCRIPTORS), k, column, out_features, in_features,
                weight_row_stride, weight_column_stride, BLOCK_K, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
            b = load_tile(col, 0, k, 0, out_features, slices * C, col_stride, 1, BLOCK_K, BLOCK_C, DESCRIPTORS)
            result = tl.dot(a, w, result, input_precision=PRECISION)
            p_sum = tl.dot(a, b, p_sum, input_precision=PRECISION)
        p_tile = tl.where(inside[None, :], p_sum, 0.0).to(p.dtype.element_ty)
        rows = tl.where(within == 0, tokens, 0)
        store_tile(p, p_tile, slice_start(j, tokens, False), token, rows, columns, inside, p_stride, BLOCK_M)
        block = middle_block(
            core, phases, o, i, 0, first_slice + j, slices, scale, C, R, HALVES, GROUPS, BLOCK_G, True, p_tile.dtype,
            PRECISION,
        )  # fmt: skip
        dh = tl.dot(p_tile, block, input_precision=PRECISION).to(p_tile.dtype)
        r = load_tile(
            row, 0, 0, column, slices * R, in_features, row_stride, 1,
            BLOCK_R, BLOCK_N, DESCRIPTORS,
        )  # fmt: skip
        result = tl.dot(dh, r, result, input_precision=PRECISION)
    n = column + tl.arange(0, BLOCK_N)
    store_tile(dx, result, 0, token, tokens, n, n < in_features, dx_stride, BLOCK_M)
