"""Jit functions that all kernels use: masked tiles, virtual columns, and B_l built in registers.

Notation of docs/maths.md: h (T, r*S), m and p (n, T, c*S) with n fused slices, u the core (S, c, r) in float32. HALVES
is 2 for the DFT (a group has a real and an imaginary half) and 1 for the DCT; a tile holds GROUPS whole groups.
"""

import triton
import triton.language as tl


@triton.jit
def slice_start(index, rows, DESCRIPTORS: tl.constexpr):
    """index * rows: 64 bits wide for pointers, 32 bits wide for the coordinates of a tensor descriptor."""
    return index * rows if DESCRIPTORS else (tl.zeros((), tl.int64) + index) * rows


@triton.jit
def load_tile(
    source, start, row, column, rows, columns, row_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr, SHIFTED: tl.constexpr = False,
):  # fmt: skip
    """source[start + row :, column :] as (ROWS, COLUMNS), zero outside of 0 <= row < rows and 0 <= column < columns.

    Only a tile in virtual columns, SHIFTED, can start at a negative column. ``source`` is a pointer, or a tensor
    descriptor, for which the hardware fills in the zeros. A descriptor has the bounds of the whole tensor only: rows at
    or after start + rows, which belong to the next slice, are not masked. Offsets are 64 bits wide between tiles and 32
    bits within one, which takes half the registers and requires strides below 2^22 elements.
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
    """The column at which a tile's virtual columns start, for blocks WIDTH wide; negative for tile 0 with padding."""
    return tile * (GROUPS * HALVES * WIDTH) - (HALVES - 1) * WIDTH


@triton.jit
def first_column(tile, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr):
    """The column from which a tile is loaded: its first virtual column, or up to 7 columns before it.

    It is a multiple of 8, so that loads are 16 bytes wide for any WIDTH, as tensor descriptors require.
    """
    below: tl.constexpr = (WIDTH + 7) // 8 * 8
    return (first_virtual(tile, WIDTH, HALVES, GROUPS) + below) // 8 * 8 - below


@triton.jit
def virtual_columns(tile, start, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Virtual columns (BLOCK,) of a tile loaded from column ``start``, relative to the tile's first."""
    return start - first_virtual(tile, WIDTH, HALVES, GROUPS) + tl.arange(0, BLOCK)


@triton.jit
def group_columns(
    tile, start, slices, WIDTH: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns (BLOCK,) of a tile loaded from ``start``, and a mask of those that exist and belong to the tile."""
    columns = start + tl.arange(0, BLOCK)
    virtual = virtual_columns(tile, start, WIDTH, HALVES, GROUPS, BLOCK)
    own = (virtual >= 0) & (virtual < GROUPS * HALVES * WIDTH)
    return columns, own & (columns >= 0) & (columns < slices * WIDTH)


@triton.jit
def _group_block(
    core, phases, o, k, tile, layer, slices, scale,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The entries of scale * B_layer for columns ``k`` of a group of h and virtual columns ``o`` of m, in float32.

    A pair with phase re + i im is [[re u_re - im u_im, -(re u_im + im u_re)], [re u_im + im u_re, re u_re - im u_im]].
    A single block is u_re with im = 0, in one of the two halves; the other half is padding.
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
        # The sign of the 2 x 2 halves of a pair: 0 on the diagonal, +1 below it, -1 above it.
        side = (o // C) % 2 - (k // R) % 2
        block = tl.where(side == 0, re * u_re - im * u_im, side * (re * u_im + im * u_re))
    return block


@triton.jit
def middle_block(
    core, phases, o, i, tile, layer, slices, scale,
    C: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    BACKWARD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * B_layer for a tile of groups, in DTYPE: (o, i) in the backward form, (i, o) in the forward form.

    ``o`` and ``i`` are the virtual columns of m and h; entries between different groups are zero. phases is (S,
    groups, 2) float32. Loading the whole tile would take a pointer per entry, and registers would spill. So only the
    entries within the groups, at most BLOCK_G wide, are loaded. A product with a matrix of zeros and ones, which is
    exact, then puts them in their places.
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
