// The ranks with specialised kernels, and when these are used. Host only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "sizes.h"

namespace tcurlora::cuda {

// Whether runs of `count` elements from a pointer on are aligned to their size, up to 16 bytes.
template <typename number>
bool aligned(const void* pointer, int count) {
  const std::uintptr_t bytes = count * sizeof(number);
  return reinterpret_cast<std::uintptr_t>(pointer) % (bytes < 16 ? bytes : 16) == 0;
}

// Calls visit(rank) with the rank as a constant where c = r is a rank with a specialised kernel and all runs are
// aligned (a tensor may start in the middle of a run); otherwise calls visit with 0. Float64 has the general kernel
// only.
template <typename scalar, typename Visit>
auto with_rank(const Sizes& sizes, const void* core, const void* a, const void* b, const Visit& visit) {
  if constexpr (!std::is_same_v<scalar, double>) {
    const auto fits = [&](int rank) {
      return sizes.c == rank && sizes.r == rank && aligned<float>(core, rank) && aligned<scalar>(a, rank) &&
             aligned<scalar>(b, rank);
    };
    if (fits(1)) return visit(std::integral_constant<int, 1>{});
    if (fits(2)) return visit(std::integral_constant<int, 2>{});
    if (fits(4)) return visit(std::integral_constant<int, 4>{});
    if (fits(8)) return visit(std::integral_constant<int, 8>{});
    if (fits(16)) return visit(std::integral_constant<int, 16>{});
  }
  return visit(std::integral_constant<int, 0>{});
}

}  // namespace tcurlora::cuda
