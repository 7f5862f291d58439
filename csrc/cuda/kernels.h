// The CUDA kernels of the middle product as plain functions: raw pointers, sizes, a stream; no torch.
//
// Notation: csrc/middle.h. All arrays are contiguous:
//
//   h, dh  (T, S*r)       p, m  (T, n, S*c)       in one element type
//   core   (S, c, r)      in the type that the elements are summed in: float, for float64 elements double
//
// A launch allocates nothing and does not wait for the device, so it may be captured in a CUDA graph; it runs on the
// current device. The same input at the same alignment gives the same bits. Returned is the launch's error, or
// cudaErrorInvalidValue for sizes that do not fit: the phases of n above 6,000 slices (3,000 in float64).
#pragma once

#include <cuda_runtime_api.h>

#include "sizes.h"

namespace tcurlora::cuda {

enum class Element : int { float32, float64, float16, bfloat16 };

// m = scale * h B^T.
cudaError_t launch_middle_forward(
    Element element, const Sizes& sizes, const void* h, const void* core, void* m, cudaStream_t stream);

// dh = scale * p B.
cudaError_t launch_middle_backward(
    Element element, const Sizes& sizes, const void* p, const void* core, void* dh, cudaStream_t stream);

// The core's gradient (S, c, r), written in the type `core`. The sums of every chunk of tokens go through `workspace`:
// room for core_gradient_workspace(sizes) numbers of the type that the elements are summed in.
cudaError_t launch_core_gradient(
    Element element, Element core, const Sizes& sizes, const void* p, const void* h, void* workspace, void* gradient,
    cudaStream_t stream);

}  // namespace tcurlora::cuda
