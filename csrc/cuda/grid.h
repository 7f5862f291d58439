// Launch configurations, a function of the sizes alone. Host only.
#pragma once

#include "tiles.h"

namespace tcurlora::cuda {

// The shared memory that a block can use without opting in to more, on every device since compute capability 8.0.
constexpr int64_t kSharedBytes = 48 << 10;

// Divides `items` evenly into blocks of at most `most`.
inline int even_width(int64_t items, int64_t most) {
  return static_cast<int>(pieces_of(items, pieces_of(items, most)));
}

// The launch of kernels that stream tokens past a tile. Blocks are `width` items wide, at most 64, so that 256 threads
// take at least 4 tokens at a time, and narrower where the phases of many slices would not fit. 1,024 blocks are
// several per multiprocessor on every device. With more tokens every block streams more of them past the tile that it
// has loaded.
template <typename acc>
Grid streaming_grid(const Sizes& sizes, int per_group, int threads, int tokens) {
  const int64_t items = sizes.groups().count() * per_group;
  int width = even_width(items, 64);
  while (width > 1 && Phases<acc>::bytes(sizes, width, per_group) > kSharedBytes) width /= 2;
  const int64_t blocks_x = pieces_of(items, width), lanes = threads / width;
  const int64_t wanted = pieces_of(sizes.tokens, lanes * tokens), most = blocks_x < 1024 ? 1024 / blocks_x : 1;
  return {
      blocks_x, wanted < most ? wanted : most, width, static_cast<int>(lanes),
      Phases<acc>::bytes(sizes, width, per_group)};
}

// Shared memory for the sums of a block's lanes, after its phases: [lane][entry][item], with an odd number of items, so
// that neighbouring items and neighbouring entries are both in different banks.
TCURLORA_HD int64_t aligned_to_16(int64_t bytes) { return (bytes + 15) / 16 * 16; }
TCURLORA_HD int odd_pitch(int width) { return width | 1; }

// Tokens of a chunk: whole steps, in each of which every lane has `tokens` of its own. With 16 tokens a chunk, S = 64 and
// r = 4 left 12 of the 28 places of the only step empty.
inline int64_t chunk_of(const Sizes& sizes, int lanes, int tokens) {
  const int64_t step = int64_t(lanes) * tokens;
  return pieces_of(least_chunk(sizes), step) * step;
}

// The launch of the sums over tokens: one block of at most 128 threads for a chunk of tokens and at most 32 items; its
// lanes take the tokens of the chunk in turn.
template <typename acc>
Grid chunk_grid(const Sizes& sizes, int per_group, int threads, int entries, int tokens) {
  const int64_t items = sizes.groups().count() * per_group;
  int width = even_width(items, 32), lanes = threads / width;
  const auto bytes = [&] {
    return aligned_to_16(Phases<acc>::bytes(sizes, width, per_group)) +
           int64_t(lanes) * entries * odd_pitch(width) * int64_t(sizeof(acc));
  };
  while (lanes > 1 && bytes() > kSharedBytes) lanes /= 2;
  while (width > 1 && bytes() > kSharedBytes) width /= 2;
  return {pieces_of(items, width), pieces_of(sizes.tokens, chunk_of(sizes, lanes, tokens)), width, lanes, bytes()};
}

}  // namespace tcurlora::cuda
