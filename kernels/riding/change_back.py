# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_decorators=False
"""The gradients of the changed input, in one pass over its gradient, and without atomics. Jit functions only."""

import triton
import triton.language as tl

from ..blocks import load_tile, store_tile
from .change import chosen_columns, chosen_entries, mixing


@triton.jit(do_not_specialize=["tokens", "slice_index"])
def ride_back(
    g, row, columns, core, gain, h, dh, workspace, tokens, features, chunk_rows, slice_index, scale,
    g_stride, h_stride, row_stride,
    C: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_CORE: tl.constexpr, NEEDS_ROW: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From g (T, in), the gradient of x': with p = g[:, columns] and dh = scale * p diag(gain) U (T, r)

        NEEDS_CORE    workspace (chunks, c, r) float32: p^T h over one chunk of tokens
        NEEDS_ROW     dh, rounded to the dtype of g
        NEEDS_X       g += dh R in place

    A program computes one chunk of ``chunk_rows`` tokens, a multiple of BLOCK_M. Those of h, dh and workspace that are
    not needed are None.

    Race: no other program reads or writes these tokens. Within the program the barrier lets the threads that gather p
    finish before any thread changes g. After it, every entry of g is read and then written by the same addition.
    """
    exact: tl.constexpr = "tf32" if g.dtype.element_ty != tl.float32 else PRECISION
    chunk = tl.program_id(0)
    start = (tl.zeros((), tl.int64) + slice_index) * R
    chosen, exists = chosen_columns(columns, features, C, BLOCK_C)
    j = tl.arange(0, BLOCK_C)[:, None]
    rank = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first = chunk * chunk_rows
    for token in tl.range(first, tl.minimum(first + chunk_rows, tokens), BLOCK_M, num_stages=1):
        mask = (token + tl.arange(0, BLOCK_M) < tokens)[:, None] & exists[None, :]
        p = tl.load(chosen_entries(g, token, chosen, g_stride, BLOCK_M), mask=mask, other=0.0)
        if NEEDS_CORE:
            hidden = load_tile(h, 0, token, 0, tokens, R, h_stride, 1, BLOCK_M, BLOCK_R, False)
            total = tl.dot(p.T, hidden, total, input_precision=PRECISION)
        if NEEDS_X or NEEDS_ROW:
            mix = mixing(core, gain, slice_index, scale, j, rank[None, :], C, R)
            dh_tile = tl.dot(p.to(tl.float32), mix, input_precision=exact).to(p.dtype)
            if NEEDS_ROW:
                store_tile(dh, dh_tile, 0, token, tokens, rank, rank < R, R, BLOCK_M)
            if NEEDS_X:
                tl.debug_barrier()
                for k in tl.range(0, features, BLOCK_K, num_stages=STAGES):
                    b = load_tile(row, start, 0, k, R, features, row_stride, 1, BLOCK_R, BLOCK_K, False)
                    a = load_tile(g, 0, token, k, tokens, features, g_stride, 1, BLOCK_M, BLOCK_K, False)
                    d = tl.dot(dh_tile, b, input_precision=PRECISION) + a.to(tl.float32)
                    feature = k + tl.arange(0, BLOCK_K)
                    store_tile(g, d, 0, token, tokens, feature, feature < features, g_stride, BLOCK_M)
    if NEEDS_CORE:
        at = workspace + (tl.zeros((), tl.int64) + chunk) * (C * R)
        tl.store(at + j * R + rank[None, :], total, mask=(j < C) & (rank < R)[None, :])


@triton.jit(do_not_specialize=["chunks", "slice_index"])
def reduce_chunks(
    workspace, gain, gradient, chunks, slices, slice_index, scale, C: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The core's gradient (S, c, r): scale * diag(gain) times the sum of the chunks, in a fixed order, for one slice.

    The gradients of the other slices are zeros. The sum is float32, the gradient has the dtype of the core. CHUNKS
    chunks are loaded at once: one after the other would wait for the memory up to 512 times.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < slices * (C * R)
    entry = at % (C * R)
    own = inside & (at // (C * R) == slice_index)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS))[:, None]
        mask = own[None, :] & (chunk < chunks)
        total += tl.sum(tl.load(workspace + chunk.to(tl.int64) * (C * R) + entry[None, :], mask=mask, other=0.0), 0)
    total *= tl.load(gain + entry // R, mask=own, other=0.0) * tl.cast(scale, tl.float32)
    tl.store(gradient + at, total.to(gradient.dtype.element_ty), mask=inside)
