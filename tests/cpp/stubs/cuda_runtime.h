// A launch on the CPU: block after block, with a thread for each of the GPU's threads and a barrier for __syncthreads,
// so that ThreadSanitizer sees what the kernels leave unordered. TCURLORA_WITHOUT_BARRIER=k leaves out the k-th barrier of
// every kernel, from 0 on: the sanitizer then has to report a race.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace tcurlora::cuda {
// Declared by the kernel; of the block that runs.
inline unsigned char shared[48 << 10] __align__(16);
}  // namespace tcurlora::cuda

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  Barrier(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};
inline Barrier* of_block = nullptr;
inline thread_local int passed = 0;  // barriers that this thread has met in its kernel

#ifndef TCURLORA_WITHOUT_BARRIER
#define TCURLORA_WITHOUT_BARRIER -1
#endif
inline void __syncthreads() {
  if (passed++ != TCURLORA_WITHOUT_BARRIER) of_block->wait();
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const unsigned width = config->blockDim.x, count = width * config->blockDim.y;
  if (config->dynamicSmemBytes > sizeof(tcurlora::cuda::shared)) return cudaErrorInvalidValue;
  // Blocks are kept apart by a barrier of their own, which is always there.
  Barrier between(count), within(count);
  of_block = &within;
  const auto run = [&](unsigned thread) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    threadIdx = dim3(thread % width, thread / width);
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y);
        if (thread == 0) std::memset(tcurlora::cuda::shared, 0xff, sizeof(tcurlora::cuda::shared));  // NaNs
        passed = 0;
        between.wait();
        kernel(arguments...);
        between.wait();
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < count; ++i) threads.emplace_back(run, i);
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
