// What csrc/cuda uses of the CUDA runtime, for a CPU: its types here, launches in cuda_runtime.h.
#pragma once

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
using cudaStream_t = void*;
