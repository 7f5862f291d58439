// The core's gradient, from P and Q (rotation.h) and h, summed over the tokens t:
//
//   du_re = sum_t P h_re^T + Q h_im^T    du_im = sum_t Q h_re^T - P h_im^T      (single block: du = sum_t P h^T)
//
// in two kernels: the sums of every chunk of tokens (grid.h), then the sum of the chunks. No atomics: the sizes fix
// the order of all additions.
#pragma once

#include "grid.h"
#include "rotation.h"

namespace tcurlora::cuda {

// An item is a tile of the core's gradient, `rows` of c by `depth` of r. The lanes of a block take the tokens of a
// chunk in turn; their sums are added in shared memory.
template <typename scalar, class Known>
struct ChunkSums {
  using Tiles = Tiling<scalar, Known>;
  using acc = acc_t<scalar>;
  static constexpr int steps = 3;
  static constexpr int threads = 128;
  static constexpr int blocks_per_processor = 3;
  static constexpr int entries = 2 * Tiles::rows * Tiles::depth;

  Sizes sizes;
  int64_t chunk;  // tokens
  const scalar* p;
  const scalar* h;
  acc* sums;  // (chunks, S, c, r)

  static TCURLORA_HD int across(const Sizes& sizes) { return Tiles::pieces(sizes.c, Tiles::rows); }
  static TCURLORA_HD int along(const Sizes& sizes) { return Tiles::pieces(sizes.r, Tiles::depth); }
  static TCURLORA_HD int per_group(const Sizes& sizes) { return across(sizes) * along(sizes); }
  static Grid grid(const Sizes& sizes) {
    return chunk_grid<acc>(sizes, per_group(sizes), threads, entries, Tiles::tokens);
  }
  static int64_t chunk_tokens(const Sizes& sizes) { return chunk_of(sizes, grid(sizes).lanes, Tiles::tokens); }

  template <int step>
  TCURLORA_HD void run(const Place& at, void* shared) const {
    const Phases<acc> phases(shared, at, per_group(sizes));
    acc* lanes = reinterpret_cast<acc*>(
        static_cast<char*>(shared) + aligned_to_16(int64_t(sizes.num_slices) * phases.count * sizeof(PhaseOf<acc>)));
    if constexpr (step == 0) {
      phases.fill(shared, at, sizes);
    } else if constexpr (step == 1) {
      if (first_item(at) + at.x < items()) sum_tokens(at, phases, item(first_item(at) + at.x), lanes);
    } else {
      sum_lanes(at, lanes);
    }
  }

 private:
  TCURLORA_HD int64_t items() const { return sizes.groups().count() * per_group(sizes); }
  TCURLORA_HD Item item(int64_t index) const {
    return item_at(sizes.groups(), index, across(sizes), Tiles::rows, along(sizes), Tiles::depth);
  }
  static TCURLORA_HD int64_t first_item(const Place& at) { return at.block_x * at.width; }

  struct Tile {
    acc re[Tiles::rows][Tiles::depth];
    acc im[Tiles::rows][Tiles::depth];
  };
  using Turned = Rotated<acc, Tiles::tokens, Tiles::rows>;
  using Runs = Run<scalar, Tiles::depth>[Tiles::tokens];

  TCURLORA_HD void sum_tokens(const Place& at, const Phases<acc>& phases, const Item& item, acc* lanes) const {
    const int c = Tiles::extent(sizes.c), r = Tiles::extent(sizes.r);
    const int64_t begin = at.block_y * chunk, end = begin + chunk < sizes.tokens ? begin + chunk : sizes.tokens;
    Tile du = {};
    for (int64_t token = begin + at.y; token < end; token += int64_t(at.lanes) * Tiles::tokens) {
      Runs real, imaginary;
      TCURLORA_UNROLL
      for (int k = 0; k < Tiles::tokens; ++k) {
        const int64_t wanted = token + int64_t(k) * at.lanes, read = wanted < end ? wanted : end - 1;
        const scalar* from = h + read * sizes.hidden() + int64_t(item.block) * r + item.along;
        real[k] = load<Tiles::unit, Tiles::depth>(from, r - item.along);
        imaginary[k] = item.pair ? load<Tiles::unit, Tiles::depth>(from + r, r - item.along) : real[k];
      }
      Turned turned;
      turned.template load_from<Tiles::unit>(p, sizes, c, phases, item, item.across, token, at.lanes, end);
      TCURLORA_UNROLL
      for (int k = 0; k < Tiles::tokens; ++k) {
        if (token + int64_t(k) * at.lanes < end) add(du, turned.P[k], turned.Q[k], real[k], imaginary[k], item.pair);
      }
    }
    acc* to = lanes + int64_t(at.y) * entries * odd_pitch(at.width) + at.x;
    TCURLORA_UNROLL
    for (int a = 0; a < Tiles::rows; ++a) {
      TCURLORA_UNROLL
      for (int b = 0; b < Tiles::depth; ++b) {
        to[(a * Tiles::depth + b) * odd_pitch(at.width)] = du.re[a][b];
        to[((Tiles::rows + a) * Tiles::depth + b) * odd_pitch(at.width)] = du.im[a][b];
      }
    }
  }

  // The outer products of one token.
  static TCURLORA_HD void add(
      Tile& du, const acc (&P)[Tiles::rows], const acc (&Q)[Tiles::rows], const Run<scalar, Tiles::depth>& h_re,
      const Run<scalar, Tiles::depth>& h_im, bool pair) {
    TCURLORA_UNROLL
    for (int b = 0; b < Tiles::depth; ++b) {
      TCURLORA_UNROLL
      for (int a = 0; a < Tiles::rows; ++a) du.re[a][b] += P[a] * h_re[b];
    }
    if (!pair) return;
    TCURLORA_UNROLL
    for (int b = 0; b < Tiles::depth; ++b) {
      TCURLORA_UNROLL
      for (int a = 0; a < Tiles::rows; ++a) {
        du.re[a][b] += Q[a] * h_im[b];
        du.im[a][b] += Q[a] * h_re[b];
        du.im[a][b] -= P[a] * h_im[b];
      }
    }
  }

  // All threads of the block take the entries of its items in turn, so that neighbouring threads write neighbours.
  TCURLORA_HD void sum_lanes(const Place& at, const acc* lanes) const {
    const int c = Tiles::extent(sizes.c), r = Tiles::extent(sizes.r), pitch = odd_pitch(at.width);
    for (int i = at.thread(); i < at.width * entries; i += at.threads()) {
      const int x = i / entries, entry = i % entries;
      if (first_item(at) + x >= items()) break;
      const Item owner = item(first_item(at) + x);
      const int part = entry / (entries / 2), row = owner.across + entry / Tiles::depth % Tiles::rows;
      const int column = owner.along + entry % Tiles::depth;
      if ((part == 1 && !owner.pair) || row >= c || column >= r) continue;
      acc sum = 0;
      for (int lane = 0; lane < at.lanes; ++lane) sum += lanes[(int64_t(lane) * entries + entry) * pitch + x];
      sums[((at.block_y * sizes.slices + owner.block + part) * c + row) * r + column] = sum;
    }
  }
};

// gradient = the sum of the chunks, in double. A block takes 32 entries of the core; each of its 8 lanes sums every
// eighth chunk, then the lanes are summed in order.
template <typename acc, typename result>
struct SumOfChunks {
  static constexpr int steps = 2;
  static constexpr int threads = 256;
  static constexpr int blocks_per_processor = 4;

  int64_t size;  // S * c * r
  int64_t chunks;
  const acc* sums;
  result* gradient;

  Grid grid() const { return {pieces_of(size, 32), 1, 32, 8, threads * int64_t(sizeof(double))}; }

  template <int step>
  TCURLORA_HD void run(const Place& at, void* shared) const {
    double* lanes = static_cast<double*>(shared);
    const int64_t entry = at.block_x * at.width + at.x;
    if (entry >= size) return;
    if constexpr (step == 0) {
      double sum = 0;
      TCURLORA_UNROLL_8
      for (int64_t chunk = at.y; chunk < chunks; chunk += at.lanes) sum += sums[chunk * size + entry];
      lanes[at.thread()] = sum;
    } else if (at.y == 0) {
      double sum = 0;
      for (int lane = 0; lane < at.lanes; ++lane) sum += lanes[lane * at.width + at.x];
      gradient[entry] = Narrow<result>::from(sum);
    }
  }
};

}  // namespace tcurlora::cuda
