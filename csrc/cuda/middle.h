// The middle product, its transpose and the core's gradient on the GPU. Notation: csrc/middle.h.
//
// csrc/cpu/middle.h describes arguments and results. Kernels run on the current stream of the tensor's device,
// without waiting for it.
#pragma once

#include "../operator.h"

namespace tcurlora::cuda {

Tensor middle_forward(const Tensor& h, const Stack& stack);

std::tuple<Tensor, Tensor> middle_backward(
    const Tensor& p, const OptionalTensor& h, const Stack& stack, bool needs_h);

}  // namespace tcurlora::cuda
