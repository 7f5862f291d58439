// Shared by the three kernels: a thread's tile of the core, and the phases of a block's groups.
//
// A tile is `rows` x `depth` entries of u_re and as many of u_im, of one group. Its thread keeps it in registers and
// streams tokens past it. Where c = r is a rank known to the compiler, `depth` is that rank, and the tile spans one
// dimension of the core's block. For any other c and r tiles are 4 x 4, and a kernel loops over them.
#pragma once

#include "elements.h"
#include "sizes.h"

namespace tcurlora::cuda {

// What a kernel knows of c and r when it is compiled: both are `rank` (0: not known), or multiples of `unit`. Runs of
// `unit` elements are aligned and never cut off by an edge of the core's block.
template <int number>
struct Rank {
  static constexpr int rank = number, unit = number;
};
template <int number>
struct MultiplesOf {
  static constexpr int rank = 0, unit = number;
};

template <typename scalar, class Known>
struct Tiling {
  using acc = acc_t<scalar>;
  static constexpr int rank = Known::rank;
  static constexpr int unit = Known::unit;
  static constexpr bool exact = rank > 0;
  static constexpr int depth = exact ? rank : 4;
  // Two parts of rows * depth elements, 256 bytes: 64 of a thread's 128 registers.
  static constexpr int most = 128 / int(sizeof(acc)) / depth;
  static constexpr int rows = !exact ? 4 : most < 1 ? 1 : most < rank ? most : rank;
  // Tokens whose loads a thread has in flight at the same time: 16 elements of each part.
  static constexpr int tokens = !exact ? 8 / int(sizeof(acc)) : rank == 1 ? 8 : 16 / rank;

  // c or r, as a constant where the rank is one; and the number of pieces of `size` that cover it.
  static TCURLORA_HD int extent(int number) { return exact ? rank : number; }
  static TCURLORA_HD int pieces(int number, int size) { return (extent(number) + size - 1) / size; }
};

// One thread's part of the core: a group and the corner of a tile, numbered group by group.
struct Item {
  int group;
  int block;  // the group's first block
  bool pair;
  int across;  // index of the first of the tile's `rows`
  int along;   // index of the first of its `depth`
};

TCURLORA_HD Item item_at(
    const Groups& groups, int64_t index, int pieces_across, int rows, int pieces_along, int depth) {
  const int number = static_cast<int>(index), in_group = number % (pieces_across * pieces_along);
  const int group = number / (pieces_across * pieces_along);
  return {
      group, static_cast<int>(groups.first_block(group)), groups.is_pair(group), in_group / pieces_along * rows,
      in_group % pieces_along * depth};
}

// u of one group, `height` x `width` entries from (row, column) on; zeros beyond its edges, and in im for a single
// block.
template <typename acc, int height, int width>
struct CoreTile {
  acc re[height][width];
  acc im[height][width];

  template <int unit>
  TCURLORA_HD void load_from(const acc* core, int c, int r, const Item& item, int row, int column) {
    constexpr bool whole = unit >= width;  // no tile is cut off, in neither dimension
    const acc* first = core + (int64_t(item.block) * c + row) * r + column;
    TCURLORA_UNROLL
    for (int a = 0; a < height; ++a) {
      const int valid = whole || row + a < c ? r - column : 0;
      const auto real = load<unit, width>(first + int64_t(a) * r, valid);
      Run<acc, width> imaginary{};
      if (item.pair) imaginary = load<unit, width>(first + (int64_t(c) + a) * r, valid);
      TCURLORA_UNROLL
      for (int b = 0; b < width; ++b) {
        re[a][b] = real[b];
        im[a][b] = imaginary[b];
      }
    }
  }
};

// The phases, scale included, of the groups that a block of threads computes: in shared memory, slice by slice.
template <typename acc>
struct Phases {
  const PhaseOf<acc>* table;
  int count;  // groups per slice
  int first;  // the first group

  // The most groups that `width` items can belong to.
  static TCURLORA_HD int groups(int width, int items_per_group) {
    return (width + items_per_group - 2) / items_per_group + 1;
  }
  static int64_t bytes(const Sizes& sizes, int width, int items_per_group) {
    return int64_t(sizes.num_slices) * groups(width, items_per_group) * sizeof(PhaseOf<acc>);
  }

  TCURLORA_HD Phases(const void* shared, const Place& at, int items_per_group)
      : table(static_cast<const PhaseOf<acc>*>(shared)),
        count(groups(at.width, items_per_group)),
        first(static_cast<int>(at.block_x * at.width / items_per_group)) {}

  TCURLORA_HD PhaseOf<acc> of(int slice, int group) const { return table[slice * count + group - first]; }

  // Filled by all threads of the block together.
  TCURLORA_HD void fill(void* shared, const Place& at, const Sizes& sizes) const {
    PhaseOf<acc>* target = static_cast<PhaseOf<acc>*>(shared);
    const Groups all = sizes.groups();
    const acc scale = static_cast<acc>(sizes.scale);
    for (int i = at.thread(); i < sizes.num_slices * count; i += at.threads()) {
      const int group = first + i % count;
      if (group >= all.count()) continue;
      const PhaseOf<acc> phase = phase_of<acc>(all, group, sizes.first_slice + i / count);
      target[i] = {scale * phase.re, scale * phase.im};
    }
  }
};

}  // namespace tcurlora::cuda
