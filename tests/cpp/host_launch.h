// A launch of a kernel's body on the CPU: block after block, step after step, thread after thread.
//
// A step of one thread must not depend on what another thread does in the same step, since on the GPU they run at once:
// the order of the threads, and of the blocks, may be reversed, and the result has to keep its bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "../../csrc/cuda/sizes.h"

namespace tcurlora::cuda::host {

enum class Order { forwards, backwards };

// Exactly the bytes asked for, aligned as on the GPU and full of NaNs.
class Shared {
 public:
  explicit Shared(int64_t bytes) : memory_(::operator new(bytes, std::align_val_t(16))) {
    std::memset(memory_, 0xff, bytes);
  }
  Shared(const Shared&) = delete;
  ~Shared() { ::operator delete(memory_, std::align_val_t(16)); }
  void* data() { return memory_; }

 private:
  void* memory_;
};

template <int step, class Body>
void run_step(const Body& body, const Grid& grid, Place place, void* shared, Order order) {
  const int threads = grid.width * grid.lanes;
  for (int i = 0; i < threads; ++i) {
    const int thread = order == Order::forwards ? i : threads - 1 - i;
    place.x = thread % grid.width;
    place.y = thread / grid.width;
    body.template run<step>(place, shared);
  }
}

template <class Body>
void run_block(const Body& body, const Grid& grid, int64_t block_x, int64_t block_y, Order order = Order::forwards) {
  const Place place{block_x, block_y, grid.blocks_y, 0, 0, grid.width, grid.lanes};
  Shared shared(grid.shared_bytes);
  run_step<0>(body, grid, place, shared.data(), order);
  run_step<1>(body, grid, place, shared.data(), order);
  if constexpr (Body::steps > 2) run_step<2>(body, grid, place, shared.data(), order);
}

template <class Body>
void launch(const Body& body, const Grid& grid, Order order) {
  static_assert(std::is_trivially_copyable_v<Body>, "a body is passed to the GPU as bytes");
  static_assert(sizeof(Body) <= 4096 && Body::steps <= 3);
  if (grid.width * grid.lanes > Body::threads || grid.shared_bytes > (48 << 10) || grid.blocks_y > 65535 ||
      grid.blocks_x > 0x7fffffff || grid.width < 1 || grid.lanes < 1) {
    throw std::runtime_error("a launch that no device accepts");
  }
  const int64_t blocks = grid.blocks_x * grid.blocks_y;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t block = order == Order::forwards ? i : blocks - 1 - i;
    run_block(body, grid, block % grid.blocks_x, block / grid.blocks_x, order);
  }
}

}  // namespace tcurlora::cuda::host
