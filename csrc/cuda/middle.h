// The middle product, its transpose and the core's gradient on the GPU. Notation: csrc/middle.h.
//
// As csrc/cpu/middle.h; on the current stream of the tensor's device, without waiting for it.
#pragma once

#include "../operator.h"

namespace tcurlora::cuda {

// m = scale * h B^T: (T, r*S) -> (T, n, c*S), in the dtype of h.
Tensor middle_forward(const Tensor& h, const Stack& stack);

// dh = scale * p B: (T, n, c*S) -> (T, r*S), in the dtype of p.
Tensor middle_backward(const Tensor& p, const Stack& stack);

// The core's gradient (S, c, r), in the core's dtype, from p (T, n, c*S) and h (T, r*S): the same bits every time.
Tensor core_gradient(const Tensor& p, const Tensor& h, const Stack& stack);

}  // namespace tcurlora::cuda
