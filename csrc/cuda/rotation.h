// The sum of the n slices of p, each multiplied by its conjugate phase, scale included:
//
//   P = sum_j (re_j p_re,j + im_j p_im,j)        Q = sum_j (re_j p_im,j - im_j p_re,j)        (single block: Q = 0)
#pragma once

#include "tiles.h"

namespace tcurlora::cuda {

// P and Q of `tokens` tokens, for `width` rows of the core.
template <typename acc, int tokens, int width>
struct Rotated {
  acc P[tokens][width];
  acc Q[tokens][width];

  // From row `row` of the group on, for tokens `lanes` apart. Tokens after the last repeat the last: callers drop them.
  template <int unit, typename scalar>
  TCURLORA_HD void load_from(
      const scalar* p, const Sizes& sizes, int c, const Phases<acc>& phases, const Item& item, int row, int64_t token,
      int lanes, int64_t end) {
    const scalar* from[tokens];
    TCURLORA_UNROLL
    for (int k = 0; k < tokens; ++k) {
      const int64_t wanted = token + int64_t(k) * lanes, read = wanted < end ? wanted : end - 1;
      from[k] = p + read * sizes.num_slices * sizes.columns() + int64_t(item.block) * c + row;
      TCURLORA_UNROLL
      for (int a = 0; a < width; ++a) P[k][a] = Q[k][a] = 0;
    }
    TCURLORA_ROLLED
    for (int j = 0; j < sizes.num_slices; ++j) {
      const PhaseOf<acc> phase = phases.of(j, item.group);
      Run<scalar, width> real[tokens], imaginary[tokens];
      TCURLORA_UNROLL
      for (int k = 0; k < tokens; ++k) {
        real[k] = load<unit, width>(from[k], c - row);
        imaginary[k] = item.pair ? load<unit, width>(from[k] + c, c - row) : real[k];
        from[k] += sizes.columns();
      }
      TCURLORA_UNROLL
      for (int k = 0; k < tokens; ++k) {
        TCURLORA_UNROLL
        for (int a = 0; a < width; ++a) P[k][a] += phase.re * real[k][a];
        if (!item.pair) continue;
        TCURLORA_UNROLL
        for (int a = 0; a < width; ++a) {
          P[k][a] += phase.im * imaginary[k][a];
          Q[k][a] += phase.re * imaginary[k][a];
          Q[k][a] -= phase.im * real[k][a];
        }
      }
    }
  }
};

}  // namespace tcurlora::cuda
