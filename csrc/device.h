// Which device a call computes on.
#pragma once

#include <ATen/core/Tensor.h>

namespace tcurlora {

// Whether the kernels for a GPU compute on this tensor. It decides the order of the wide products too (native.cpp). In a
// source of its own: tests that run the GPU's part on a CPU link another one.
bool on_gpu(const at::Tensor& tensor);

}  // namespace tcurlora
