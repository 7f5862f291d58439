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

inline int64_t pieces_of(int64_t number, int64_t size) { return (number + size - 1) / size; }

// The core's gradient is summed in fixed chunks of tokens, a function of the sizes alone. A chunk has at least as many as
// this, 64 or more, and is then filled up to whole steps of the kernel's lanes (grid.h). There are thus at most 512
// chunks, and in all at most 2^20 partial sums (4 MB) unless one chunk already has more.
inline int64_t least_chunk(const Sizes& sizes) {
  const int64_t room = (int64_t(1) << 20) / sizes.core();
  const int64_t most = room < 1 ? 1 : room > 512 ? 512 : room;
  const int64_t tokens = pieces_of(sizes.tokens, most);
  return tokens < 64 ? 64 : tokens;
}
// Partial sums of all chunks, or more.
inline int64_t core_gradient_workspace(const Sizes& sizes) {
  return pieces_of(sizes.tokens, least_chunk(sizes)) * sizes.core();
}

// The riding form (csrc/riding/riding.h): one slice, and rows of x or of its gradient that are `step` elements apart.
struct RidingSizes {
  int64_t tokens;    // T
  int64_t features;  // of x
  int64_t step;
  int c;
  int r;
  double scale;

  Sizes one_slice() const { return {tokens, 1, c, r, 0, 1, Transform::dft, scale}; }
};

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
