// CPU kernels of the middle product, its transpose and the core's gradient. Notation: csrc/middle.h.
#pragma once

#include "../operator.h"

namespace tcurlora::cpu {

// m = scale * h B^T: h (T, r*S) -> m (T*n, c*S), row t*n + j for slice j, in the dtype of h.
Tensor middle_forward(const Tensor& h, const Stack& stack);

// From p (T*n, c*S): dh = scale * p B (T, r*S), in the dtype of p, where `needs_h`; the core's gradient (S, c, r), in
// the core's dtype, where h (T, r*S) is given. What is not asked for is an undefined tensor. The core's gradient is
// summed over chunks of tokens and then over the chunks in order: its bits do not depend on the number of threads.
std::tuple<Tensor, Tensor> middle_backward(
    const Tensor& p, const OptionalTensor& h, const Stack& stack, bool needs_h);

}  // namespace tcurlora::cpu
