// From g, the gradient of x', whose chosen features are p = g[:, J]:
//
//   dh = scale * p diag(gain) U        dU = scale * diag(gain) p^T h
//
// A token's p is c elements of a row of g, gathered by both kernels.
#pragma once

#include "grid.h"

namespace tcurlora::cuda {

// Element `feature` of a row of g; zero for a feature that there is none of.
template <typename scalar>
TCURLORA_HD acc_t<scalar> chosen(const RidingSizes& sizes, const scalar* g, int64_t token, int64_t feature) {
  return feature < 0 || feature >= sizes.features ? acc_t<scalar>(0) : widened(g[token * sizes.step + feature]);
}

// dh. A block takes some tokens: it gathers their scale * p diag(gain) into shared memory, then a thread computes one
// element of dh after another.
template <typename scalar>
struct HiddenGradient {
  using acc = acc_t<scalar>;
  static constexpr int steps = 2;
  static constexpr int threads = 128;
  static constexpr int blocks_per_processor = 8;
  static constexpr int most_tokens = 32;

  RidingSizes sizes;
  int tokens;  // of a block
  const scalar* g;
  const acc* core;
  const acc* gain;
  const int64_t* columns;
  scalar* dh;

  // Tokens of a block whose p fits into shared memory; 0 where not even one does.
  static int block_tokens(const RidingSizes& sizes) {
    const int64_t fits = kSharedBytes / (int64_t(sizes.c) * int64_t(sizeof(acc)));
    return static_cast<int>(fits < most_tokens ? fits : most_tokens);
  }
  static Grid grid(const RidingSizes& sizes) {
    const int tokens = block_tokens(sizes);
    return {pieces_of(sizes.tokens, tokens), 1, threads, 1, int64_t(tokens) * sizes.c * int64_t(sizeof(acc))};
  }

  template <int step>
  TCURLORA_HD void run(const Place& at, void* shared) const {
    acc* p = static_cast<acc*>(shared);
    const int64_t begin = at.block_x * tokens, rest = sizes.tokens - begin;
    const int count = static_cast<int>(rest < tokens ? rest : tokens), c = sizes.c, r = sizes.r;
    if constexpr (step == 0) {
      for (int i = at.thread(); i < count * c; i += at.threads()) {
        const int column = i % c;
        p[i] = static_cast<acc>(sizes.scale) * gain[column] * chosen(sizes, g, begin + i / c, columns[column]);
      }
    } else {
      for (int i = at.thread(); i < count * r; i += at.threads()) {
        const acc *from = p + i / r * c, *u = core + i % r;
        acc sum = 0;
        TCURLORA_UNROLL_8
        for (int j = 0; j < c; ++j) sum += from[j] * u[int64_t(j) * r];
        dh[begin * r + i] = Narrow<scalar>::from(sum);
      }
    }
  }
};

// The core's gradient of every chunk of tokens (grid.h). An item is a tile of 4 x 4 of its entries. The lanes of a block
// take the tokens of a chunk in turn; their sums are added in shared memory. SumOfChunks (core_gradient.h) adds the chunks.
template <typename scalar>
struct ChangeSums {
  using acc = acc_t<scalar>;
  static constexpr int steps = 2;
  static constexpr int threads = 128;
  static constexpr int blocks_per_processor = 4;
  static constexpr int edge = 4, entries = edge * edge;
  static constexpr int tokens = 2;  // whose loads a thread has in flight at the same time

  RidingSizes sizes;
  int64_t chunk;  // tokens
  const scalar* g;
  const scalar* h;
  const acc* gain;
  const int64_t* columns;
  acc* sums;  // (chunks, c, r)

  static TCURLORA_HD int pieces(int number) { return (number + edge - 1) / edge; }
  static TCURLORA_HD int items(const RidingSizes& sizes) { return pieces(sizes.c) * pieces(sizes.r); }
  static Grid grid(const RidingSizes& sizes) {
    return chunk_grid<acc>(sizes.one_slice(), items(sizes), threads, entries, tokens);
  }
  static int64_t chunk_tokens(const RidingSizes& sizes) {
    return chunk_of(sizes.one_slice(), grid(sizes).lanes, tokens);
  }

  template <int step>
  TCURLORA_HD void run(const Place& at, void* shared) const {
    acc* lanes = static_cast<acc*>(shared);
    if constexpr (step == 0) {
      const int64_t item = at.block_x * at.width + at.x;
      if (item < items(sizes)) sum_tokens(at, static_cast<int>(item), lanes);
    } else {
      sum_lanes(at, lanes);
    }
  }

 private:
  TCURLORA_HD int row_of(int item) const { return item / pieces(sizes.r) * edge; }
  TCURLORA_HD int column_of(int item) const { return item % pieces(sizes.r) * edge; }

  TCURLORA_HD void sum_tokens(const Place& at, int item, acc* lanes) const {
    const int row = row_of(item), column = column_of(item);
    const int64_t begin = at.block_y * chunk, end = begin + chunk < sizes.tokens ? begin + chunk : sizes.tokens;
    int64_t features[edge];
    TCURLORA_UNROLL
    for (int a = 0; a < edge; ++a) features[a] = row + a < sizes.c ? columns[row + a] : -1;
    acc du[edge][edge] = {};
    for (int64_t token = begin + at.y; token < end; token += int64_t(at.lanes) * tokens) {
      acc p[tokens][edge];
      Run<scalar, edge> hidden[tokens];
      TCURLORA_UNROLL
      for (int k = 0; k < tokens; ++k) {
        const int64_t wanted = token + int64_t(k) * at.lanes, read = wanted < end ? wanted : end - 1;
        hidden[k] = load<1, edge>(h + read * sizes.r + column, sizes.r - column);
        TCURLORA_UNROLL
        for (int a = 0; a < edge; ++a) p[k][a] = chosen(sizes, g, read, features[a]);
      }
      TCURLORA_UNROLL
      for (int k = 0; k < tokens; ++k) {
        if (token + int64_t(k) * at.lanes >= end) break;
        TCURLORA_UNROLL
        for (int a = 0; a < edge; ++a) {
          TCURLORA_UNROLL
          for (int b = 0; b < edge; ++b) du[a][b] += p[k][a] * hidden[k][b];
        }
      }
    }
    acc* to = lanes + int64_t(at.y) * entries * odd_pitch(at.width) + at.x;
    TCURLORA_UNROLL
    for (int a = 0; a < edge; ++a) {
      TCURLORA_UNROLL
      for (int b = 0; b < edge; ++b) to[(a * edge + b) * odd_pitch(at.width)] = du[a][b];
    }
  }

  // All threads of the block take the entries of its items in turn, so that neighbouring threads write neighbours.
  TCURLORA_HD void sum_lanes(const Place& at, const acc* lanes) const {
    const int pitch = odd_pitch(at.width);
    for (int i = at.thread(); i < at.width * entries; i += at.threads()) {
      const int x = i / entries, entry = i % entries;
      const int64_t item = at.block_x * at.width + x;
      if (item >= items(sizes)) break;
      const int row = row_of(static_cast<int>(item)) + entry / edge;
      const int column = column_of(static_cast<int>(item)) + entry % edge;
      if (row >= sizes.c || column >= sizes.r) continue;
      acc sum = 0;
      for (int lane = 0; lane < at.lanes; ++lane) sum += lanes[(int64_t(lane) * entries + entry) * pitch + x];
      sums[(at.block_y * sizes.c + row) * sizes.r + column] = static_cast<acc>(sizes.scale) * gain[row] * sum;
    }
  }
};

}  // namespace tcurlora::cuda
