"""What the kernels share: masked tiles, virtual columns, and B_l built in registers. Jit functions only.

Notation of docs/maths.md: h (T, r*S), m and p (n, T, c*S) with n fused slices, u the core (S, c, r) in float32. HALVES
is 2 for the DFT (a group has a real and an imaginary half) and 1 for the DCT; a tile holds GROUPS whole groups.
"""

import triton
import triton.language as tl


@triton.jit
def slice_start(index, rows, DESCRIPTORS: tl.constexpr):
    """index * rows: 64 bits wide for pointers, 32 for the coordinates of a tensor descriptor."""
    return index * rows if DESCRIPTORS else (tl.zeros((), tl.int64) + index) * rows


@triton.jit
def load_tile(
    source, start, row, column, rows, columns, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr, SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """source[start + row :, column :] as (ROWS, COLUMNS), zero outside of 0 <= row < rows and 0 <= column < columns.

    Only a tile in virtual columns, SHIFTED, begins below 0. ``source`` is a tensor descriptor, whose hardware fills the
    zeros, or a pointer. A descriptor knows the bounds of the whole tensor only: rows of the next slice, beyond start +
    rows, are read as they are. Offsets are 64 bits wide between tiles and 32 within one, in half the registers: strides
    stay below 2^22 elements.
    """
    if DESCRIPTOR:
        tile = source.load([start + row, column])
    else:
        i = tl.arange(0, ROWS)
        j = tl.arange(0, COLUMNS)
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        if SHIFTED:
            inside = inside & (row + i >= 0)[:, None] & (column + j >= 0)[None, :]
        origin = (tl.zeros((), tl.int64) + start + row) * row_stride + (tl.zeros((), tl.int64) + column) * column_stride
        tile = tl.load(source + origin + (i[:, None] * row_stride + j[None, :] * column_stride), mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(target, tile, start, row, rows, columns, inside, row_stride, ROWS: tl.constexpr):
    """target[start + row :, columns] = tile for row < rows and the columns that are ``inside``."""
    i = tl.arange(0, ROWS)
    origin = (tl.zeros((), tl.int64) + start + row) * row_stride
    mask = (row + i < rows)[:, None] & inside[None, :]
    tl.store(
        target + origin + (i[:, None] * row_stride + columns[None, :]), tile.to(target.dtype.element_ty), mask=mask
    )


@triton.jit
def count_groups(slices, HALVES: tl.constexpr):
    return slices // 2 + 1 if HALVES == 2 else slices


@triton.jit
def first_virtual(tile, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """The column of the first virtual column of a tile of groups whose blocks are WIDTH wide; negative for tile 0."""
    return tile * (GROUPS * HALVES * WIDTH) - (HALVES - 1) * WIDTH


@triton.jit
def first_column(tile, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """Where a tile is fetched from: its first virtual column, or up to 7 before it.

    A multiple of 8 columns, so that loads are 16 bytes wide whatever WIDTH is, as tensor descriptors demand.
    """
    below: tl.constexpr = (WIDTH + 7) // 8 * 8
    return (first_virtual(tile, WIDTH, HALVES, GROUPS) + below) // 8 * 8 - below


@triton.jit
def virtual_columns(tile, start, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Virtual columns (BLOCK,), counted from the tile's first, of a tile fetched from column ``start``."""
    return start - first_virtual(tile, WIDTH, HALVES, GROUPS) + tl.arange(0, BLOCK)


@triton.jit
def group_columns(
    tile, start, slices, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns (BLOCK,) of a tile fetched from ``start``, and which of them exist and are the tile's own."""
    columns = start + tl.arange(0, BLOCK)
    virtual = virtual_columns(tile, start, WIDTH, HALVES, GROUPS, BLOCK)
    own = (virtual >= 0) & (virtual < GROUPS * HALVES * WIDTH)
    return columns, own & (columns >= 0) & (columns < slices * WIDTH)


@triton.jit
def _group_block(
    core, phases, o, k, tile, layer, slices, scale,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """scale * B_layer from column ``k`` of a group of h to the virtual columns ``o`` of m in the same group, float32.

    Of a pair with phase re + i im: [[re u_re - im u_im, -(re u_im + im u_re)], [re u_im + im u_re, re u_re - im u_im]].
    A block alone is the real part u_re with im = 0 in the half where it lies; the other half is padding.
    """
    local = o // (HALVES * C)
    group = tile * GROUPS + local
    groups = count_groups(slices, HALVES)
    exists = (o >= 0) & (local < GROUPS) & (group < groups)
    inside = exists & (k < HALVES * R)
    at = phases + (layer * groups + group) * 2
    re = tl.load(at, mask=exists, other=0.0) * tl.cast(scale, tl.float32)
    entry = (o % C) * R + k % R
    if HALVES == 1:
        block = re * tl.load(core + group * (C * R) + entry, mask=inside, other=0.0)
    else:
        im = tl.load(at + 1, mask=exists, other=0.0) * tl.cast(scale, tl.float32)
        first = tl.maximum(2 * group - 1, 0)
        pair = (group > 0) & (2 * group < slices)
        u_re = tl.load(core + first * (C * R) + entry, mask=inside, other=0.0)
        u_im = tl.load(core + (first + 1) * (C * R) + entry, mask=inside & pair, other=0.0)
        # +1 below the diagonal of halves, -1 above it, 0 on it.
        side = (o // C) % 2 - (k // R) % 2
        block = tl.where(side == 0, re * u_re - im * u_im, side * (re * u_im + im * u_re))
    return block


@triton.jit
def middle_block(
    core, phases, o, i, tile, layer, slices, scale,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    BACKWARD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * B_layer of a tile of groups: (o, i) in the backward form, (i, o) in the forward form, of type DTYPE.

    ``o`` and ``i`` are the virtual columns of m and h, entries between different groups are zero. phases (S layers,
    groups, 2) float32. A dense tile of loads would need a pointer for each entry and spills; so the entries of one
    group, at most BLOCK_G wide, are loaded, and a product with a matrix of zeros and ones, which is exact, repeats them
    for every group.
    """
    k = tl.arange(0, BLOCK_G)
    if BACKWARD:
        group = _group_block(
            core, phases, o[:, None], k[None, :], tile, layer, slices, scale, C, R, HALVES, GROUPS
        )  # fmt: skip
        spread = k[:, None] == (i % (HALVES * R))[None, :]
        block = tl.dot(group.to(DTYPE), spread.to(DTYPE), input_precision=PRECISION)
        same = (o // (HALVES * C))[:, None] == (i // (HALVES * R))[None, :]
        own = (o >= 0)[:, None] & (i >= 0)[None, :]
    else:
        group = _group_block(
            core, phases, o[None, :], k[:, None], tile, layer, slices, scale, C, R, HALVES, GROUPS
        )  # fmt: skip
        spread = (i % (HALVES * R))[:, None] == k[None, :]
        block = tl.dot(spread.to(DTYPE), group.to(DTYPE), input_precision=PRECISION)
        same = (i // (HALVES * R))[:, None] == (o // (HALVES * C))[None, :]
        own = (i >= 0)[:, None] & (o >= 0)[None, :]
    return tl.where(same & own, block, 0.0).to(DTYPE)
