// x' = x, x'[:, J] += scale * h (diag(gain) U)^T: a block copies its tokens' rows, and then changes their chosen entries.
#pragma once

#include "grid.h"
#include "ranks.h"

namespace tcurlora::cuda {

// Rows are copied in runs of `unit` elements. The lanes of a block take its tokens in turn, `width` threads each.
template <typename scalar, int unit>
struct ChangedInput {
  using acc = acc_t<scalar>;
  static constexpr int steps = 2;
  static constexpr int threads = 256;
  static constexpr int blocks_per_processor = 4;
  static constexpr int tokens = 4;     // of a lane
  static constexpr int in_flight = 4;  // runs that a thread reads before it writes the first

  RidingSizes sizes;
  const scalar* x;
  const scalar* h;
  const acc* core;
  const acc* gain;
  const int64_t* columns;
  scalar* changed;

  static Grid grid(const RidingSizes& sizes) {
    int width = 32;
    while (width < threads && int64_t(width) * unit * in_flight < sizes.features) width *= 2;
    const int lanes = threads / width;
    return {pieces_of(sizes.tokens, int64_t(lanes) * tokens), 1, width, lanes, 0};
  }

  template <int step>
  TCURLORA_HD void run(const Place& at, void*) const {
    const int64_t begin = at.block_x * at.lanes * tokens, rest = sizes.tokens - begin;
    const int count = static_cast<int>(rest < at.lanes * tokens ? rest : at.lanes * tokens);
    if constexpr (step == 0) {
      for (int token = at.y; token < count; token += at.lanes) copy_row(at, begin + token);
    } else {
      for (int i = at.thread(); i < count * sizes.c; i += at.threads()) change(begin + i / sizes.c, i % sizes.c);
    }
  }

 private:
  TCURLORA_HD void copy_row(const Place& at, int64_t token) const {
    const scalar* from = x + token * sizes.step;
    scalar* to = changed + token * sizes.features;
    const int64_t stride = int64_t(at.width) * unit;
    for (int64_t first = int64_t(at.x) * unit; first < sizes.features; first += stride * in_flight) {
      Run<scalar, unit> runs[in_flight];
      TCURLORA_UNROLL
      for (int k = 0; k < in_flight; ++k) {
        if (first + k * stride < sizes.features) runs[k] = load<unit, unit>(from + first + k * stride, unit);
      }
      TCURLORA_UNROLL
      for (int k = 0; k < in_flight; ++k) {
        if (first + k * stride < sizes.features) store_run(to + first + k * stride, runs[k]);
      }
    }
  }

  // From x, not from the copy: the barrier before this step orders the two stores alone.
  TCURLORA_HD void change(int64_t token, int column) const {
    const int64_t feature = columns[column];
    if (feature < 0 || feature >= sizes.features) return;
    const scalar* hidden = h + token * sizes.r;
    const acc* u = core + int64_t(column) * sizes.r;
    acc sum = 0;
    TCURLORA_UNROLL_8
    for (int k = 0; k < sizes.r; ++k) sum += u[k] * widened(hidden[k]);
    const acc before = widened(x[token * sizes.step + feature]);
    changed[token * sizes.features + feature] =
        Narrow<scalar>::from(before + static_cast<acc>(sizes.scale) * gain[column] * sum);
  }
};

// Calls visit(MultiplesOf<unit>) with the length of the runs that a row is copied in: of 16 bytes where all rows of both
// tensors are aligned to them, and otherwise single elements.
template <typename scalar, typename Visit>
auto with_runs(const RidingSizes& sizes, const void* x, const void* changed, const Visit& visit) {
  constexpr int most = 16 / int(sizeof(scalar));
  const bool whole = sizes.features % most == 0 && sizes.step % most == 0 && aligned<scalar>(x, most) &&
                     aligned<scalar>(changed, most);
  return whole ? visit(MultiplesOf<most>{}) : visit(MultiplesOf<1>{});
}

}  // namespace tcurlora::cuda
