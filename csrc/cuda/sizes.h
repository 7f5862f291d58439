// Sizes of a problem, and how a launch divides it among blocks and threads. Shared by the GPU and by a run on the CPU.
#pragma once

#include <cstdint>

#include "../middle.h"

namespace tcurlora::cuda {

struct Sizes {
  int64_t tokens;     // T
  int slices;         // S
  int c;              // rows of a block of the core
  int r;              // columns of a block of the core
  int first_slice;    // the layer's first slice, l
  int num_slices;     // n
  Transform transform;
  double scale;

  TCURLORA_HD Groups groups() const { return {slices, transform}; }
  TCURLORA_HD int64_t hidden() const { return int64_t(slices) * r; }   // elements of h per token
  TCURLORA_HD int64_t columns() const { return int64_t(slices) * c; }  // elements of p or m per token and slice
  int64_t core() const { return int64_t(slices) * c * r; }
};

// The core's gradient is summed in fixed chunks of tokens, a function of the sizes alone: at least 16 tokens each, at
// most 512 chunks, and in all at most 2^20 partial sums (4 MB) unless one chunk already has more.
inline int64_t chunk_tokens(const Sizes& sizes) {
  const int64_t room = (int64_t(1) << 20) / sizes.core();
  const int64_t most = room < 1 ? 1 : room > 512 ? 512 : room;
  const int64_t tokens = (sizes.tokens + most - 1) / most;
  return tokens < 16 ? 16 : tokens;
}
inline int64_t chunk_count(const Sizes& sizes) {
  return (sizes.tokens + chunk_tokens(sizes) - 1) / chunk_tokens(sizes);
}
inline int64_t core_gradient_workspace(const Sizes& sizes) { return chunk_count(sizes) * sizes.core(); }

// A launch: blocks (x, y) of `width` items by `lanes` tokens. Each kernel defines what an item is (tiles.h).
struct Grid {
  int64_t blocks_x;
  int64_t blocks_y;
  int width;
  int lanes;
  int64_t shared_bytes;
};

// The indices of a thread in such a launch: blockIdx, threadIdx and gridDim on the GPU.
struct Place {
  int64_t block_x;
  int64_t block_y;
  int64_t blocks_y;
  int x;
  int y;
  int width;
  int lanes;

  TCURLORA_HD int thread() const { return y * width + x; }
  TCURLORA_HD int threads() const { return width * lanes; }
};

}  // namespace tcurlora::cuda
