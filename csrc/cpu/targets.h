// Kernels compiled for several instruction sets and chosen at run time: a wheel has to run on every x86-64.
#pragma once

#include <cstdint>

// Defines name(call, begin, end) for Call<scalar>: body(call, begin, end), which is always inlined, for the best
// instruction set of the machine.
#if defined(__x86_64__)
#define TCURLORA_FOR_EACH_TARGET(name, Call, body)                                                                 \
  template <typename scalar>                                                                                       \
  void name##_any(const Call<scalar>& call, int64_t begin, int64_t end) {                                          \
    body(call, begin, end);                                                                                        \
  }                                                                                                                \
  template <typename scalar>                                                                                       \
  __attribute__((target("avx2,fma,f16c"))) void name##_avx2(                                                       \
      const Call<scalar>& call, int64_t begin, int64_t end) {                                                      \
    body(call, begin, end);                                                                                        \
  }                                                                                                                \
  template <typename scalar>                                                                                       \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))) void name##_avx512(                  \
      const Call<scalar>& call, int64_t begin, int64_t end) {                                                      \
    body(call, begin, end);                                                                                        \
  }                                                                                                                \
  template <typename scalar>                                                                                       \
  void name(const Call<scalar>& call, int64_t begin, int64_t end) {                                                \
    if (has_avx512()) return name##_avx512(call, begin, end);                                                      \
    if (has_avx2()) return name##_avx2(call, begin, end);                                                          \
    name##_any(call, begin, end);                                                                                  \
  }
#else
#define TCURLORA_FOR_EACH_TARGET(name, Call, body)                 \
  template <typename scalar>                                       \
  void name(const Call<scalar>& call, int64_t begin, int64_t end) { \
    body(call, begin, end);                                        \
  }
#endif

namespace tcurlora::cpu {

#if defined(__x86_64__)
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq");
  return has;
}
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

}  // namespace tcurlora::cpu
