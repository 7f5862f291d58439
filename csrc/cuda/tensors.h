// What the kernels ask of a tensor: its element type, and the type that its elements are summed in.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace tcurlora::cuda {

inline Element element_of(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::float32;
    case at::kDouble: return Element::float64;
    case at::kHalf: return Element::float16;
    case at::kBFloat16: return Element::bfloat16;
    default:
      TORCH_CHECK_VALUE(
          false, name, " is ", tensor.scalar_type(), ", the CUDA kernels take float32, float64, float16 and bfloat16");
  }
}

inline at::ScalarType accumulation_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace tcurlora::cuda
