// Which kernel takes which c, r and addresses. Host only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tiles.h"

namespace tcurlora::cuda {

// Whether runs of `count` elements from a pointer on are aligned to their size, up to 16 bytes.
template <typename number>
bool aligned(const void* pointer, int count) {
  const std::uintptr_t bytes = count * sizeof(number);
  return reinterpret_cast<std::uintptr_t>(pointer) % (bytes < 16 ? bytes : 16) == 0;
}

// Calls visit(known) with what the kernel may know of c and r (tiles.h): their rank where c = r is one with a
// specialised kernel; otherwise that they are multiples of 4 or of 2; otherwise nothing, MultiplesOf<1>. All runs have to
// be aligned for it: a tensor may start in the middle of a run. Float64 has the general kernel only.
template <typename scalar, typename Visit>
auto with_known(const Sizes& sizes, const void* core, const void* a, const void* b, const Visit& visit) {
  if constexpr (!std::is_same_v<scalar, double>) {
    const auto runs = [&](int count) {
      return aligned<float>(core, count) && aligned<scalar>(a, count) && aligned<scalar>(b, count);
    };
    const auto fits = [&](int rank) { return sizes.c == rank && sizes.r == rank && runs(rank); };
    const auto multiples = [&](int unit) { return sizes.c % unit == 0 && sizes.r % unit == 0 && runs(unit); };
    if (fits(1)) return visit(Rank<1>{});
    if (fits(2)) return visit(Rank<2>{});
    if (fits(4)) return visit(Rank<4>{});
    if (fits(8)) return visit(Rank<8>{});
    if (fits(16)) return visit(Rank<16>{});
    if (multiples(4)) return visit(MultiplesOf<4>{});
    if (multiples(2)) return visit(MultiplesOf<2>{});
  }
  return visit(MultiplesOf<1>{});
}

}  // namespace tcurlora::cuda
