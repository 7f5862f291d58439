// Blocks of a launch that run at once, for ThreadSanitizer.
#pragma once

#include <cstdint>
#include <thread>

#include "host_launch.h"

namespace tcurlora::cuda {

// Two threads take the blocks of a grid in turn, so that neighbouring blocks run at once; or each takes them all.
template <class Body>
void run_blocks(const Body& body, const Grid& grid, bool overlapping) {
  const auto take = [&](int64_t first, int64_t step) {
    for (int64_t i = first; i < grid.blocks_x * grid.blocks_y; i += step) {
      host::run_block(body, grid, i % grid.blocks_x, i / grid.blocks_x);
    }
  };
  std::thread one(take, 0, overlapping ? 1 : 2), other(take, overlapping ? 0 : 1, overlapping ? 1 : 2);
  one.join();
  other.join();
}

}  // namespace tcurlora::cuda
