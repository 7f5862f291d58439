// The CUDA kernels of the middle product as plain functions: raw pointers, sizes, a stream; no torch.
//
// Notation: csrc/middle.h. All arrays are contiguous:
//
//   h, dh  (T, S*r)       p, m  (T, n, S*c)       in one element type
//   core   (S, c, r)      in the type that the elements are summed in: float, for float64 elements double
//
// A launch runs on the current device. It allocates nothing and does not wait for the device, so that it can be
// captured in a CUDA graph. The same input at the same alignment gives the same bits. The result is the launch's error,
// or cudaErrorInvalidValue where the phases do not fit: those of more than n = 6,000 slices (3,000 in float64).
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

// The core's gradient (S, c, r), written in the type `core`. `workspace` is memory for the sums of every chunk of
// tokens: core_gradient_workspace(sizes) elements of the type that the elements are summed in.
cudaError_t launch_core_gradient(
    Element element, Element core, const Sizes& sizes, const void* p, const void* h, void* workspace, void* gradient,
    cudaStream_t stream);

// gradient (size elements of the type `core`) = the sum of the chunks (chunks, size), in a fixed order. The chunks are in
// the type that elements of type `element` are summed in.
cudaError_t launch_sum_of_chunks(
    Element element, Element core, int64_t size, int64_t chunks, const void* sums, void* gradient, cudaStream_t stream);

// The riding form: x, changed and g (T, features), h and dh (T, r), core (c, r), gain and columns (c). All are contiguous
// but for the rows of x and g. core and gain are in the type that the elements are summed in, columns are of 64 bits; those
// that x does not have are left out.

// changed = x, changed[:, columns] += scale * h (diag(gain) U)^T.
cudaError_t launch_riding_forward(
    Element element, const RidingSizes& sizes, const void* x, const void* h, const void* core, const void* gain,
    const int64_t* columns, void* changed, cudaStream_t stream);

// dh = scale * g[:, columns] diag(gain) U. cudaErrorInvalidValue where c is more than 12,288 (6,144 in float64).
cudaError_t launch_riding_backward(
    Element element, const RidingSizes& sizes, const void* g, const void* core, const void* gain,
    const int64_t* columns, void* dh, cudaStream_t stream);

// The core's gradient (c, r) in the type `core`: scale * diag(gain) g[:, columns]^T h. `workspace` is memory for
// core_gradient_workspace(sizes.one_slice()) elements of the type that the elements are summed in.
cudaError_t launch_riding_core_gradient(
    Element element, Element core, const RidingSizes& sizes, const void* g, const void* h, const void* gain,
    const int64_t* columns, void* workspace, void* gradient, cudaStream_t stream);

}  // namespace tcurlora::cuda
