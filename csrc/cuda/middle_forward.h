// m = scale * h B^T, with z = u h once and a rotation of it for each of the n slices:
//
//   z_re = u_re h_re - u_im h_im    z_im = u_im h_re + u_re h_im        (single block: z_re = u h)
//   m_j  = (re_j z_re - im_j z_im,  im_j z_re + re_j z_im)              phase_j = re_j + i im_j
#pragma once

#include "grid.h"
#include "tiles.h"

namespace tcurlora::cuda {

// An item is a group and `rows` rows of its z; the tile spans the columns of u, which are those of h.
template <typename scalar, class Known>
struct MiddleForward {
  using Tiles = Tiling<scalar, Known>;
  using acc = acc_t<scalar>;
  static constexpr int steps = 2;
  static constexpr int threads = 256;
  static constexpr int blocks_per_processor = 2;

  Sizes sizes;
  const scalar* h;
  const acc* core;
  scalar* m;

  static TCURLORA_HD int per_group(const Sizes& sizes) { return Tiles::pieces(sizes.c, Tiles::rows); }
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
  struct Products {
    acc re[Tiles::tokens][Tiles::rows];
    acc im[Tiles::tokens][Tiles::rows];
  };

  TCURLORA_HD void stream(const Place& at, const Phases<acc>& phases, const Item& item) const {
    CoreTile<acc, Tiles::rows, Tiles::depth> u;
    if constexpr (Tiles::exact) u.template load_from<Tiles::unit>(core, Tiles::rank, Tiles::rank, item, item.across, 0);
    const int64_t tile = int64_t(at.lanes) * Tiles::tokens;
    for (int64_t token = at.block_y * tile + at.y; token < sizes.tokens; token += at.blocks_y * tile) {
      Products z = {};
      if constexpr (Tiles::exact) {
        multiply(z, u, item, token, at.lanes, 0);
      } else {
        for (int column = 0; column < sizes.r; column += Tiles::depth) {
          u.template load_from<Tiles::unit>(core, sizes.c, sizes.r, item, item.across, column);
          multiply(z, u, item, token, at.lanes, column);
        }
      }
      rotate(z, phases, item, token, at.lanes);
    }
  }

  // z += u h over the tile's columns. Tokens after the last repeat it: their loads are valid, and they are not stored.
  TCURLORA_HD void multiply(
      Products& z, const CoreTile<acc, Tiles::rows, Tiles::depth>& u, const Item& item, int64_t token, int lanes,
      int column) const {
    const int r = Tiles::extent(sizes.r);
    Run<scalar, Tiles::depth> real[Tiles::tokens], imaginary[Tiles::tokens];
    TCURLORA_UNROLL
    for (int k = 0; k < Tiles::tokens; ++k) {
      const int64_t wanted = token + int64_t(k) * lanes, read = wanted < sizes.tokens ? wanted : sizes.tokens - 1;
      const scalar* from = h + read * sizes.hidden() + int64_t(item.block) * r + column;
      real[k] = load<Tiles::unit, Tiles::depth>(from, r - column);
      imaginary[k] = item.pair ? load<Tiles::unit, Tiles::depth>(from + r, r - column) : real[k];
    }
    TCURLORA_UNROLL
    for (int k = 0; k < Tiles::tokens; ++k) {
      TCURLORA_UNROLL
      for (int b = 0; b < Tiles::depth; ++b) {
        const acc h_re = real[k][b];
        TCURLORA_UNROLL
        for (int a = 0; a < Tiles::rows; ++a) z.re[k][a] += u.re[a][b] * h_re;
      }
      if (!item.pair) continue;
      TCURLORA_UNROLL
      for (int b = 0; b < Tiles::depth; ++b) {
        const acc h_re = real[k][b], h_im = imaginary[k][b];
        TCURLORA_UNROLL
        for (int a = 0; a < Tiles::rows; ++a) {
          z.re[k][a] -= u.im[a][b] * h_im;
          z.im[k][a] += u.im[a][b] * h_re;
          z.im[k][a] += u.re[a][b] * h_im;
        }
      }
    }
  }

  TCURLORA_HD void rotate(
      const Products& z, const Phases<acc>& phases, const Item& item, int64_t token, int lanes) const {
    const int c = Tiles::extent(sizes.c);
    TCURLORA_ROLLED
    for (int j = 0; j < sizes.num_slices; ++j) {
      const PhaseOf<acc> phase = phases.of(j, item.group);
      TCURLORA_UNROLL
      for (int k = 0; k < Tiles::tokens; ++k) {
        const int64_t written = token + int64_t(k) * lanes;
        if (written >= sizes.tokens) break;
        acc real[Tiles::rows], imaginary[Tiles::rows];
        TCURLORA_UNROLL
        for (int a = 0; a < Tiles::rows; ++a) {
          real[a] = phase.re * z.re[k][a] - phase.im * z.im[k][a];
          imaginary[a] = phase.im * z.re[k][a] + phase.re * z.im[k][a];
        }
        scalar* to = m + (written * sizes.num_slices + j) * sizes.columns() + int64_t(item.block) * c + item.across;
        store<Tiles::unit>(to, real, c - item.across);
        if (item.pair) store<Tiles::unit>(to + c, imaginary, c - item.across);
      }
    }
  }
};

}  // namespace tcurlora::cuda
