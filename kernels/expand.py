"""The base product and the adapter's last product as one product with two K segments. Jit functions only."""

import triton
import triton.language as tl

from .blocks import load_tile, slice_start, store_tile


@triton.jit
def _segment(
    accumulator, a, b, a_start, token, b_start, column, tokens, width, depth,
    a_stride, b_row_stride, b_column_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """accumulator + a b^T with b (width, depth), or a b with b (depth, width) in the backward form."""
    for k in range(0, depth, BLOCK_K):
        left = load_tile(a, a_start, token, k, tokens, depth, a_stride, 1, BLOCK_M, BLOCK_K, DESCRIPTORS)
        if BACKWARD:
            right = load_tile(
                b, b_start, k, column, depth, width, b_row_stride, b_column_stride, BLOCK_K, BLOCK_N, DESCRIPTORS
            )
        else:
            right = load_tile(
                b, b_start, column, k, width, depth, b_row_stride, b_column_stride, BLOCK_N, BLOCK_K, DESCRIPTORS
            ).T
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["tokens"])
def expand(
    a, b, inner, factor, bias, result, tokens, width, depth, inner_depth, num_slices,
    a_stride, b_row_stride, b_column_stride, inner_stride, factor_stride, result_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """result = [a, inner] [b, factor]^T + bias: one product whose K runs over two segments, in a persistent grid.

    forward    y_j = [x, m_j] [W_j, col]^T + bias_j    a = x (T, in)       inner = m (n, T, c*S)    factor = col
    backward   dx = [g, dh] [W; row]                   a = g (T, n*out)    inner = dh (T, r*S)      factor = row

    b is W (n*out, in) in both.

    ``width`` is the width of a slice of the result (out, or in), ``depth`` and ``inner_depth`` are the lengths of the
    two K segments. A tile has columns of one slice only. Tiles are computed in bands of BAND rows of tiles, so that
    programs that run at the same time share rows of a and columns of b in L2. a, b, inner and factor are pointers or
    descriptors: of (BLOCK_M, BLOCK_K) for a and inner, of (BLOCK_N, BLOCK_K) for b and factor, or of (BLOCK_K, BLOCK_N)
    in the backward form.
    """
    rows = tl.cdiv(tokens, BLOCK_M)
    columns = tl.cdiv(width, BLOCK_N)
    across = columns * num_slices
    for index in range(tl.program_id(0), rows * across, tl.num_programs(0)):
        band = index // (BAND * across)
        height = tl.minimum(rows - band * BAND, BAND)
        within = index % (BAND * across)
        token = (band * BAND + within % height) * BLOCK_M
        j = (within // height) // columns
        column = ((within // height) % columns) * BLOCK_N

        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        accumulator = _segment(
            accumulator, a, b, 0, token, slice_start(j, width, DESCRIPTORS), column, tokens, width, depth,
            a_stride, b_row_stride, b_column_stride, BLOCK_M, BLOCK_N, BLOCK_K, BACKWARD, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        accumulator = _segment(
            accumulator, inner, factor, slice_start(j, tokens, DESCRIPTORS), token, 0, column, tokens, width,
            inner_depth, inner_stride, factor_stride, 1, BLOCK_M, BLOCK_N, BLOCK_K, BACKWARD, PRECISION, DESCRIPTORS,
        )  # fmt: skip
        n = column + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            accumulator += tl.load(bias + j * width + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        store_tile(result, accumulator, 0, token, tokens, j * width + n, n < width, result_stride, BLOCK_M)
