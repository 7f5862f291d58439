# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_decorators=False
"""x' = x with the adapter's change at the chosen columns, in one pass over x. Jit functions only."""

import triton
import triton.language as tl

from ..blocks import load_tile, store_tile


@triton.jit
def mixing(core, gain, slice_index, scale, j, k, C: tl.constexpr, R: tl.constexpr):
    """The entries (j, k) of scale * diag(gain) U of a slice, float32; zeros outside of (C, R).

    core (S, c, r) and gain (c,) are float32; ``j`` and ``k`` are broadcast against each other.
    """
    u = core + (tl.zeros((), tl.int64) + slice_index) * (C * R)
    entries = tl.load(u + j * R + k, mask=(j < C) & (k < R), other=0.0)
    return entries * tl.load(gain + j, mask=j < C, other=0.0) * tl.cast(scale, tl.float32)


@triton.jit
def chosen_columns(columns, features, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The chosen columns (BLOCK_C,) and a mask of those that exist: none outside of x is read or written."""
    j = tl.arange(0, BLOCK_C)
    chosen = tl.load(columns + j, mask=j < C, other=-1)
    return chosen, (chosen >= 0) & (chosen < features)


@triton.jit
def chosen_entries(matrix, token, chosen, stride, BLOCK_M: tl.constexpr):
    """Pointers (BLOCK_M, BLOCK_C) to the chosen columns of a block of tokens. Offsets in the block have 32 bits."""
    i = tl.arange(0, BLOCK_M)
    return matrix + (tl.zeros((), tl.int64) + token) * stride + (i[:, None] * stride + chosen.to(tl.int32)[None, :])


@triton.jit(do_not_specialize=["tokens", "slice_index"])
def ride(
    x, row, columns, core, gain, changed, h, tokens, features, slice_index, scale, x_stride, row_stride,
    C: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = x R^T (T, r) and x' (T, in): x, with h (scale * diag(gain) U)^T added at ``columns``.

    A program computes BLOCK_M tokens. It reads x once: each tile is multiplied by R and copied to x'. The change is
    computed from h as it is stored, rounded, with the core in at least tf32, and added in float32.

    Race: the copy and the change of one entry of x' are stores of different threads of the same program, and no other
    program has these tokens. The barrier orders the two. The change is added to x, not to what is read back from x'.
    """
    token = tl.program_id(0) * BLOCK_M
    start = (tl.zeros((), tl.int64) + slice_index) * R
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, features, BLOCK_K):
        a = load_tile(x, 0, token, k, tokens, features, x_stride, 1, BLOCK_M, BLOCK_K, False)
        b = load_tile(row, start, 0, k, R, features, row_stride, 1, BLOCK_R, BLOCK_K, False)
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
        feature = k + tl.arange(0, BLOCK_K)
        store_tile(changed, a, 0, token, tokens, feature, feature < features, features, BLOCK_M)
    h_tile = total.to(h.dtype.element_ty)
    rank = tl.arange(0, BLOCK_R)
    store_tile(h, h_tile, 0, token, tokens, rank, rank < R, R, BLOCK_M)

    j = tl.arange(0, BLOCK_C)
    mix = mixing(core, gain, slice_index, scale, j[None, :], rank[:, None], C, R)
    change = tl.dot(h_tile.to(tl.float32), mix, input_precision="tf32" if h_tile.dtype != tl.float32 else PRECISION)
    chosen, exists = chosen_columns(columns, features, C, BLOCK_C)
    mask = (token + tl.arange(0, BLOCK_M) < tokens)[:, None] & exists[None, :]
    before = tl.load(chosen_entries(x, token, chosen, x_stride, BLOCK_M), mask=mask, other=0.0)
    after = (before.to(tl.float32) + change).to(changed.dtype.element_ty)
    tl.debug_barrier()
    tl.store(chosen_entries(changed, token, chosen, features, BLOCK_M), after, mask=mask)
