// float16 of the CUDA toolkit, as torch's type for the CPU.
#pragma once

#include <c10/util/Half.h>

using __half = c10::Half;

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half __double2half(double value) { return static_cast<float>(value); }
