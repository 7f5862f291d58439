#include "core_gradient.h"

#include "launch.h"
#include "ranks.h"

namespace tcurlora::cuda {

cudaError_t launch_core_gradient(
    Element element, Element core, const Sizes& sizes, const void* p, const void* h, void* workspace, void* gradient,
    cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using scalar = typename decltype(type)::type;
    using acc = acc_t<scalar>;
    acc* sums = static_cast<acc*>(workspace);
    int64_t chunks = 0;
    const cudaError_t error = with_known<scalar>(sizes, sums, p, h, [&](auto known) {
      using Body = ChunkSums<scalar, decltype(known)>;
      const Grid grid = Body::grid(sizes);
      chunks = grid.blocks_y;
      const Body body{
          sizes, Body::chunk_tokens(sizes), static_cast<const scalar*>(p), static_cast<const scalar*>(h), sums};
      return launch(body, grid, stream);
    });
    if (error != cudaSuccess) return error;
    return launch_sum_of_chunks(element, core, sizes.core(), chunks, sums, gradient, stream);
  });
}

cudaError_t launch_sum_of_chunks(
    Element element, Element core, int64_t size, int64_t chunks, const void* sums, void* gradient,
    cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using acc = acc_t<typename decltype(type)::type>;
    return with_element(core, [&](auto core_type) {
      using result = typename decltype(core_type)::type;
      const SumOfChunks<acc, result> body{
          size, chunks, static_cast<const acc*>(sums), static_cast<result*>(gradient)};
      return launch(body, body.grid(), stream);
    });
  });
}

}  // namespace tcurlora::cuda
