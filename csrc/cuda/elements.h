// Element types, and how runs of neighbouring elements are read and written. Host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "../middle.h"

#if defined(__CUDACC__) || __has_include(<cuda_bf16.h>)
#define TCURLORA_HALVES 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#define TCURLORA_HALVES 0
#endif

#if defined(__CUDACC__)
#define TCURLORA_UNROLL _Pragma("unroll")
#define TCURLORA_UNROLL_8 _Pragma("unroll 8")
#define TCURLORA_ROLLED _Pragma("unroll 1")
#else
#define TCURLORA_UNROLL
#define TCURLORA_UNROLL_8
#define TCURLORA_ROLLED
#endif

namespace tcurlora::cuda {

// The type that elements are summed in.
template <typename scalar>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename scalar>
using acc_t = typename Accumulation<scalar>::type;

TCURLORA_HD float widened(float value) { return value; }
TCURLORA_HD double widened(double value) { return value; }

// Converts a sum to an element, rounding to nearest.
template <typename scalar>
struct Narrow {
  template <typename acc>
  static TCURLORA_HD scalar from(acc value) {
    return static_cast<scalar>(value);
  }
};

#if TCURLORA_HALVES
TCURLORA_HD float widened(__half value) { return __half2float(value); }
TCURLORA_HD float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

template <>
struct Narrow<__half> {
  static TCURLORA_HD __half from(float value) { return __float2half_rn(value); }
  static TCURLORA_HD __half from(double value) { return __double2half(value); }
};
template <>
struct Narrow<__nv_bfloat16> {
  static TCURLORA_HD __nv_bfloat16 from(float value) { return __float2bfloat16_rn(value); }
  static TCURLORA_HD __nv_bfloat16 from(double value) { return __double2bfloat16(value); }
};
#endif

// `count` neighbouring elements (a power of two), aligned to their size up to 16 bytes: one or several accesses.
template <typename scalar, int count>
struct alignas(sizeof(scalar) * count < 16 ? sizeof(scalar) * count : 16) Run {
  scalar value[count];

  TCURLORA_HD acc_t<scalar> operator[](int i) const { return widened(value[i]); }
};

// Reads `count` neighbouring elements in runs of `unit` whose addresses are aligned, all at once where there is only one.
// Of several, each is read if it starts before element `valid`; the others are zeros.
template <int unit, int count, typename scalar>
TCURLORA_HD Run<scalar, count> load(const scalar* from, int valid) {
  if constexpr (unit >= count) {
    return *reinterpret_cast<const Run<scalar, count>*>(from);
  } else {
    Run<scalar, count> all;
    TCURLORA_UNROLL
    for (int i = 0; i < count; i += unit) {
      Run<scalar, unit> run;
      TCURLORA_UNROLL
      for (int k = 0; k < unit; ++k) run.value[k] = Narrow<scalar>::from(0.0f);
      if (i < valid) run = *reinterpret_cast<const Run<scalar, unit>*>(from + i);
      TCURLORA_UNROLL
      for (int k = 0; k < unit; ++k) all.value[i + k] = run.value[k];
    }
    return all;
  }
}

// Writes a run to memory at once. The GPU's instruction is written out: the compiler would split an assignment into
// elements and join only some of them again.
template <typename scalar, int count>
TCURLORA_HD void store_run(scalar* to, const Run<scalar, count>& run) {
#if defined(__CUDA_ARCH__)
  constexpr int access = alignof(Run<scalar, count>);
  unsigned int words[sizeof(run) / 4 + 1];
  memcpy(words, run.value, sizeof(run));
  const size_t address = __cvta_generic_to_global(to);
  TCURLORA_UNROLL
  for (int i = 0; i < int(sizeof(run)) / access; ++i) {
    const unsigned int* w = words + i * access / 4;
    if constexpr (access == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   :: "l"(address + i * access), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
    } else if constexpr (access == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(address + i * access), "r"(w[0]), "r"(w[1]) : "memory");
    } else if constexpr (access == 4) {
      asm volatile("st.global.b32 [%0], %1;" :: "l"(address + i * access), "r"(w[0]) : "memory");
    } else {
      *reinterpret_cast<Run<scalar, count>*>(to) = run;
    }
  }
#else
  *reinterpret_cast<Run<scalar, count>*>(to) = run;
#endif
}

// Writes sums to memory as elements, in runs as `load` reads them.
template <int unit, typename scalar, typename acc, int count>
TCURLORA_HD void store(scalar* to, const acc (&sums)[count], int valid) {
  constexpr int length = unit < count ? unit : count;
  TCURLORA_UNROLL
  for (int i = 0; i < count; i += length) {
    Run<scalar, length> run;
    TCURLORA_UNROLL
    for (int k = 0; k < length; ++k) run.value[k] = Narrow<scalar>::from(sums[i + k]);
    if (length == count || i < valid) store_run(to + i, run);
  }
}

}  // namespace tcurlora::cuda
