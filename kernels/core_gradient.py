"""The core's gradient in two stages without atomics, so that the same input gives the same bits. Jit functions only."""

import triton
import triton.language as tl

from .blocks import count_groups, first_column, load_tile, slice_start, virtual_columns


@triton.jit(do_not_specialize=["tokens"])
def partial_gradient(
    p, h, workspace, tokens, slices, num_slices, chunk_rows, p_stride, h_stride,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stage 1: the diagonal group blocks of p_j^T h over one chunk of tokens, for one tile of groups and one slice j.

    p (n, T, c*S) and h (T, r*S) are read from memory: on Hopper, products of a transposed accumulator are not reliable.
    workspace is (chunks, n, groups, HALVES*c, HALVES*r) float32, with zeros in halves that are padding. Programs: tiles
    of groups (fastest), slices, chunks of ``chunk_rows`` tokens, a multiple of BLOCK_T.
    """
    groups = count_groups(slices, HALVES)
    tiles = tl.cdiv(groups, GROUPS)
    tile = tl.program_id(0) % tiles
    j = (tl.program_id(0) // tiles) % num_slices
    chunk = tl.program_id(0) // (tiles * num_slices)
    p_start = slice_start(j, tokens, False)
    c_column = first_column(tile, C, HALVES, GROUPS)
    r_column = first_column(tile, R, HALVES, GROUPS)
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first = chunk * chunk_rows
    for t in range(first, tl.minimum(first + chunk_rows, tokens), BLOCK_T):
        a = load_tile(p, p_start, t, c_column, tokens, slices * C, p_stride, 1, BLOCK_T, BLOCK_C, False, True)
        b = load_tile(h, 0, t, r_column, tokens, slices * R, h_stride, 1, BLOCK_T, BLOCK_R, False, True)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    o = virtual_columns(tile, c_column, C, HALVES, GROUPS, BLOCK_C)[:, None]
    i = virtual_columns(tile, r_column, R, HALVES, GROUPS, BLOCK_R)[None, :]
    local = o // (HALVES * C)
    group = tile * GROUPS + local
    inside = (o >= 0) & (i >= 0) & (local == i // (HALVES * R)) & (local < GROUPS) & (group < groups)
    start = ((tl.zeros((), tl.int64) + chunk) * num_slices + j) * groups
    at = ((start + group) * (HALVES * C) + o % (HALVES * C)) * (HALVES * R) + i % (HALVES * R)
    tl.store(workspace + at, total, mask=inside)


@triton.jit(do_not_specialize=["first_slice", "chunks"])
def reduce_gradient(
    workspace, phases, gradient, chunks, slices, num_slices, first_slice, scale,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stage 2: the core's gradient (S, c, r) float32 from the workspace of stage 1, summed in a fixed order.

    D is a slice's block, summed over the chunks, with A = D_re,re + D_im,im and B = D_im,re - D_re,im. Then du_re =
    scale sum_j (re_j A + im_j B) and du_im = scale sum_j (re_j B - im_j A). For a single block one half of D is
    padding, im = 0, and there is only du_re.
    """
    groups = count_groups(slices, HALVES)
    parts = tl.cdiv(C * R, BLOCK)
    group = tl.program_id(0) // parts
    entry = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    valid = entry < C * R
    a = entry // R
    b = entry % R
    re_sum = tl.zeros((BLOCK,), tl.float32)
    im_sum = tl.zeros((BLOCK,), tl.float32)
    width: tl.constexpr = HALVES * R
    for j in range(num_slices):
        along = tl.zeros((BLOCK,), tl.float32)
        across = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(chunks):
            start = ((tl.zeros((), tl.int64) + chunk) * num_slices + j) * groups + group
            at = workspace + start * (HALVES * C * width)
            along += tl.load(at + a * width + b, mask=valid, other=0.0)
            if HALVES == 2:
                along += tl.load(at + (C + a) * width + R + b, mask=valid, other=0.0)
                across += tl.load(at + (C + a) * width + b, mask=valid, other=0.0)
                across -= tl.load(at + a * width + R + b, mask=valid, other=0.0)
        at_phase = phases + ((first_slice + j) * groups + group) * 2
        re = tl.load(at_phase)
        im = tl.load(at_phase + 1)
        re_sum += re * along + im * across
        im_sum += re * across - im * along
    factor = tl.cast(scale, tl.float32)
    if HALVES == 2:
        block = tl.maximum(2 * group - 1, 0)
        entries = tl.where((group > 0) & (2 * group < slices), C * R, 0)  # a single block has no imaginary part
        tl.store(gradient + (block + 1) * (C * R) + entry, im_sum * factor, mask=entry < entries)
    else:
        block = group
    tl.store(gradient + block * (C * R) + entry, re_sum * factor, mask=valid)
