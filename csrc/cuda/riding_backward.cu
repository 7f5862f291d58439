#include "riding_backward.h"

#include "launch.h"

namespace tcurlora::cuda {

cudaError_t launch_riding_backward(
    Element element, const RidingSizes& sizes, const void* g, const void* core, const void* gain,
    const int64_t* columns, void* dh, cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using scalar = typename decltype(type)::type;
    using acc = acc_t<scalar>;
    using Body = HiddenGradient<scalar>;
    const int tokens = Body::block_tokens(sizes);
    if (tokens == 0) return cudaErrorInvalidValue;
    const Body body{
        sizes, tokens, static_cast<const scalar*>(g), static_cast<const acc*>(core), static_cast<const acc*>(gain),
        columns, static_cast<scalar*>(dh)};
    return launch(body, Body::grid(sizes), stream);
  });
}

cudaError_t launch_riding_core_gradient(
    Element element, Element core, const RidingSizes& sizes, const void* g, const void* h, const void* gain,
    const int64_t* columns, void* workspace, void* gradient, cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using scalar = typename decltype(type)::type;
    using acc = acc_t<scalar>;
    using Body = ChangeSums<scalar>;
    const Grid grid = Body::grid(sizes);
    const Body body{
        sizes, Body::chunk_tokens(sizes), static_cast<const scalar*>(g), static_cast<const scalar*>(h),
        static_cast<const acc*>(gain), columns, static_cast<acc*>(workspace)};
    const cudaError_t error = launch(body, grid, stream);
    if (error != cudaSuccess) return error;
    return launch_sum_of_chunks(
        element, core, int64_t(sizes.c) * sizes.r, grid.blocks_y, workspace, gradient, stream);
  });
}

}  // namespace tcurlora::cuda
