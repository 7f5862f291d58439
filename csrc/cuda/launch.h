// From a kernel's body to a launch on the GPU. A function of the runtime instead of <<<>>>: tests compile this file for
// the CPU, with a runtime that has a thread for each of the GPU's (tests/cpp/stubs).
#pragma once

#include <cuda_runtime.h>

#include "grid.h"
#include "kernels.h"

namespace tcurlora::cuda {

// The steps of a body, with a barrier between them.
template <class Body>
__global__ void __launch_bounds__(Body::threads, Body::blocks_per_processor)
steps_of(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Place at = {
      blockIdx.x, blockIdx.y, gridDim.y, int(threadIdx.x), int(threadIdx.y), int(blockDim.x), int(blockDim.y)};
  body.template run<0>(at, shared);
  __syncthreads();
  body.template run<1>(at, shared);
  if constexpr (Body::steps > 2) {
    __syncthreads();
    body.template run<2>(at, shared);
  }
}

template <class Body>
cudaError_t launch(const Body& body, const Grid& grid, cudaStream_t stream) {
  if (grid.blocks_x == 0 || grid.blocks_y == 0) return cudaSuccess;
  if (grid.shared_bytes > kSharedBytes || grid.blocks_x > 0x7fffffff) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks_x), static_cast<unsigned>(grid.blocks_y));
  config.blockDim = dim3(grid.width, grid.lanes);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, steps_of<Body>, body);
}

template <typename scalar>
struct TypeOf {
  using type = scalar;
};

// Calls visit(TypeOf<scalar>) for an element type.
template <typename Visit>
cudaError_t with_element(Element element, const Visit& visit) {
  switch (element) {
    case Element::float32: return visit(TypeOf<float>{});
    case Element::float64: return visit(TypeOf<double>{});
    case Element::float16: return visit(TypeOf<__half>{});
    case Element::bfloat16: return visit(TypeOf<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace tcurlora::cuda
