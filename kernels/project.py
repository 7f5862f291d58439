"""h and m in one pass over x, p and dh in one pass over g. Jit functions only.

A program computes BLOCK_M tokens of one tile of GROUPS whole groups: the middle product needs no other columns. Tiles
of groups are the fastest axis of the grid, so that programs that run at the same time read the same tokens.
"""

import triton
import triton.language as tl

from .blocks import (
    count_groups,
    first_column,
    group_columns,
    load_tile,
    middle_block,
    slice_start,
    store_tile,
    virtual_columns,
)


@triton.jit(do_not_specialize=["tokens", "first_slice"])
def project(
    x, row, core, phases, h, m, tokens, in_features, slices, num_slices, first_slice, scale,
    x_stride, row_stride, h_stride, m_stride,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """h = x row^T (T, r*S), rounded to its dtype, and from it m_j = scale h B_j^T (n, T, c*S).

    x (T, in) and row (r*S, in): pointers, or descriptors of tiles (BLOCK_M, BLOCK_K) and (BLOCK_R, BLOCK_K).
    """
    tiles = tl.cdiv(count_groups(slices, HALVES), GROUPS)
    tile = tl.program_id(0) % tiles
    token = (tl.program_id(0) // tiles) * BLOCK_M
    start = first_column(tile, R, HALVES, GROUPS)
    accumulator = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        a = load_tile(x, 0, token, k, tokens, in_features, x_stride, 1, BLOCK_M, BLOCK_K, DESCRIPTORS)
        b = load_tile(row, 0, start, k, slices * R, in_features, row_stride, 1, BLOCK_R, BLOCK_K, DESCRIPTORS, True)
        accumulator = tl.dot(a, b.T, accumulator, input_precision=PRECISION)
    columns, inside = group_columns(tile, start, slices, R, HALVES, GROUPS, BLOCK_R)
    h_tile = tl.where(inside[None, :], accumulator, 0.0).to(h.dtype.element_ty)
    store_tile(h, h_tile, 0, token, tokens, columns, inside, h_stride, BLOCK_M)

    i = virtual_columns(tile, start, R, HALVES, GROUPS, BLOCK_R)
    start = first_column(tile, C, HALVES, GROUPS)
    o = virtual_columns(tile, start, C, HALVES, GROUPS, BLOCK_C)
    columns, inside = group_columns(tile, start, slices, C, HALVES, GROUPS, BLOCK_C)
    # One stage: this loop loads u into registers, and staged copies of u would fill the shared memory.
    for j in tl.range(0, num_slices, num_stages=1, disable_licm=True):
        block = middle_block(
            core, phases, o, i, tile, first_slice + j, slices, scale, C, R, HALVES, GROUPS, BLOCK_G, False,
            h_tile.dtype, PRECISION,
        )  # fmt: skip
        m_tile = tl.dot(h_tile, block, input_precision=PRECISION)
        store_tile(m, m_tile, slice_start(j, tokens, False), token, tokens, columns, inside, m_stride, BLOCK_M)


@triton.jit(do_not_specialize=["tokens", "first_slice"])
def project_back(
    g, col, core, phases, p, dh, tokens, out_features, slices, num_slices, first_slice, scale,
    g_stride, col_stride, p_stride, dh_stride,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """p_j = g_j col (n, T, c*S), rounded to its dtype, and from it dh = scale sum_j p_j B_j (T, r*S).

    g (T, n*out) and col (out, c*S): pointers, or descriptors of tiles (BLOCK_M, BLOCK_K) and (BLOCK_K, BLOCK_C). With
    descriptors, out is a multiple of BLOCK_K, so that no tile has columns of g from the next slice.
    """
    tiles = tl.cdiv(count_groups(slices, HALVES), GROUPS)
    tile = tl.program_id(0) % tiles
    token = (tl.program_id(0) // tiles) * BLOCK_M
    start = first_column(tile, C, HALVES, GROUPS)
    dh_start = first_column(tile, R, HALVES, GROUPS)
    columns, inside = group_columns(tile, start, slices, C, HALVES, GROUPS, BLOCK_C)
    o = virtual_columns(tile, start, C, HALVES, GROUPS, BLOCK_C)
    i = virtual_columns(tile, dh_start, R, HALVES, GROUPS, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for j in tl.range(0, num_slices, num_stages=1, disable_licm=True):
        accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        end = (j + 1) * out_features
        for k in range(0, out_features, BLOCK_K):
            a = load_tile(g, 0, token, j * out_features + k, tokens, end, g_stride, 1, BLOCK_M, BLOCK_K, DESCRIPTORS)
            b = load_tile(
                col, 0, k, start, out_features, slices * C, col_stride, 1, BLOCK_K, BLOCK_C, DESCRIPTORS, True
            )
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        p_tile = tl.where(inside[None, :], accumulator, 0.0).to(p.dtype.element_ty)
        store_tile(p, p_tile, slice_start(j, tokens, False), token, tokens, columns, inside, p_stride, BLOCK_M)
        block = middle_block(
            core, phases, o, i, tile, first_slice + j, slices, scale, C, R, HALVES, GROUPS, BLOCK_G, True, p_tile.dtype,
            PRECISION,
        )  # fmt: skip
        total = tl.dot(p_tile, block, total, input_precision=PRECISION)
    columns, inside = group_columns(tile, dh_start, slices, R, HALVES, GROUPS, BLOCK_R)
    store_tile(dh, total, 0, token, tokens, columns, inside, dh_stride, BLOCK_M)
