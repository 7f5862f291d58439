// dh = scale * p B, from P and Q (rotation.h), with the transposed core:
//
//   dh_re = u_re^T P + u_im^T Q    dh_im = u_re^T Q - u_im^T P          (single block: dh_re = u^T P)
#pragma once

#include "grid.h"
#include "rotation.h"

namespace tcurlora::cuda {

// An item is a group and `rows` neighbouring entries of its dh, which are columns of u; the tile spans the rows of u,
// which are those of p. The threads of a group compute the same P and Q: 4 n c multiplications beside the 4 c rows of
// the product, but without communication between them.
template <typename scalar, class Known>
struct MiddleBackward {
  using Tiles = Tiling<scalar, Known>;
  using acc = acc_t<scalar>;
  static constexpr int steps = 2;
  static constexpr int threads = 128;
  static constexpr int blocks_per_processor = 3;

  Sizes sizes;
  const scalar* p;
  const acc* core;
  scalar* dh;

  static TCURLORA_HD int per_group(const Sizes& sizes) { return Tiles::pieces(sizes.r, Tiles::rows); }
  static Grid grid(const Sizes& sizes) {
    return streaming_grid<acc>(sizes, per_group(sizes), threads, Tiles::tokens);
  }

  template <int step>
  TCURLORA_HD void run(const Place& at, void* shared) const {
    const Phases<acc> phases(shared, at, per_group(sizes));
    if constexpr (step == 0) {
      phases.fill(shared, at, sizes);
    } else {
      const int64_t index = at.block_x * at.width + at.x;
      if (index >= sizes.groups().count() * per_group(sizes)) return;
      stream(at, phases, item_at(sizes.groups(), index, per_group(sizes), Tiles::rows, 1, Tiles::depth));
    }
  }

 private:
  using Tile = CoreTile<acc, Tiles::depth, Tiles::rows>;
  using Turned = Rotated<acc, Tiles::tokens, Tiles::depth>;
  struct Products {
    acc re[Tiles::tokens][Tiles::rows];
    acc im[Tiles::tokens][Tiles::rows];
  };

  TCURLORA_HD void stream(const Place& at, const Phases<acc>& phases, const Item& item) const {
    Tile u;
    if constexpr (Tiles::exact) u.template load_from<Tiles::unit>(core, Tiles::rank, Tiles::rank, item, 0, item.across);
    const int c = Tiles::extent(sizes.c);
    const int64_t tile = int64_t(at.lanes) * Tiles::tokens;
    for (int64_t token = at.block_y * tile + at.y; token < sizes.tokens; token += at.blocks_y * tile) {
      Products sums = {};
      for (int row = 0; row < c; row += Tiles::depth) {
        if constexpr (!Tiles::exact) u.template load_from<Tiles::unit>(core, sizes.c, sizes.r, item, row, item.across);
        Turned turned;
        turned.template load_from<Tiles::unit>(p, sizes, c, phases, item, row, token, at.lanes, sizes.tokens);
        multiply(sums, u, turned, item.pair);
      }
      write(sums, item, token, at.lanes);
    }
  }

  static TCURLORA_HD void multiply(Products& sums, const Tile& u, const Turned& turned, bool pair) {
    TCURLORA_UNROLL
    for (int k = 0; k < Tiles::tokens; ++k) {
      TCURLORA_UNROLL
      for (int a = 0; a < Tiles::depth; ++a) {
        TCURLORA_UNROLL
        for (int b = 0; b < Tiles::rows; ++b) sums.re[k][b] += u.re[a][b] * turned.P[k][a];
      }
      if (!pair) continue;
      TCURLORA_UNROLL
      for (int a = 0; a < Tiles::depth; ++a) {
        TCURLORA_UNROLL
        for (int b = 0; b < Tiles::rows; ++b) {
          sums.re[k][b] += u.im[a][b] * turned.Q[k][a];
          sums.im[k][b] += u.re[a][b] * turned.Q[k][a];
          sums.im[k][b] -= u.im[a][b] * turned.P[k][a];
        }
      }
    }
  }

  TCURLORA_HD void write(const Products& sums, const Item& item, int64_t token, int lanes) const {
    const int r = Tiles::extent(sizes.r);
    TCURLORA_UNROLL
    for (int k = 0; k < Tiles::tokens; ++k) {
      const int64_t written = token + int64_t(k) * lanes;
      if (written >= sizes.tokens) break;
      scalar* to = dh + written * sizes.hidden() + int64_t(item.block) * r + item.across;
      store<Tiles::unit>(to, sums.re[k], r - item.across);
      if (item.pair) store<Tiles::unit>(to + r, sums.im[k], r - item.across);
    }
  }
};

}  // namespace tcurlora::cuda
