// The middle product of a TCUR layer, block by block: arithmetic that CPU and CUDA share. No torch header.
//
// The core (S, c, r) is in the coordinates of the slice transform (tcurlora_ext/maths/folding.py). Its S blocks are, for
// the DFT, frequency 0, then the real and the imaginary part of 1, 2, ..., and for even S frequency S/2; for the DCT S
// single blocks. Slice l multiplies them by phases:
//
//   single  B = w u                                w = (+-1)^l / sqrt(S), for the DCT the entry (block, l) of its matrix
//   pair    B = w [[a, -b], [b, a]]                a + ib = exp(2 pi i k l / S) (u_re + i u_im),  w = sqrt(2 / S)
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TCURLORA_HD __host__ __device__ __forceinline__
#else
#define TCURLORA_HD inline
#endif

namespace tcurlora {

enum class Transform : int { dft = 0, dct = 1 };

// How the S blocks of a stack divide into groups: `alone` single blocks and `pairs` of two.
struct Groups {
  int64_t slices;
  Transform transform;

  TCURLORA_HD int64_t count() const { return transform == Transform::dct ? slices : slices / 2 + 1; }
  TCURLORA_HD bool is_pair(int64_t group) const {
    return transform == Transform::dft && group > 0 && 2 * group < slices;
  }
  // Index of the first block of a group.
  TCURLORA_HD int64_t first_block(int64_t group) const {
    return transform == Transform::dct || group == 0 ? group : 2 * group - 1;
  }
  TCURLORA_HD int64_t width(int64_t group) const { return is_pair(group) ? 2 : 1; }
};

// Phase times weight of a group for slice l: a pair is multiplied by (re + i im), a single block by re.
template <typename acc>
struct alignas(2 * sizeof(acc)) PhaseOf {
  acc re;
  acc im;
};
using Phase = PhaseOf<double>;

// exp(i pi t) for |t| <= 1. On the GPU in the precision of `acc`, by functions that, unlike sin and cos, use no local
// memory.
template <typename acc>
TCURLORA_HD PhaseOf<acc> unit_phase(acc t) {
  PhaseOf<acc> phase;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(acc) == sizeof(float)) {
    sincospif(t, &phase.im, &phase.re);
  } else {
    sincospi(t, &phase.im, &phase.re);
  }
#else
  const double angle = 3.14159265358979323846 * static_cast<double>(t);
  phase = {static_cast<acc>(std::cos(angle)), static_cast<acc>(std::sin(angle))};
#endif
  return phase;
}

// Angles are integers, reduced to half a turn, until a single division: there is one rounding, for any S and l.
template <typename acc = double>
TCURLORA_HD PhaseOf<acc> phase_of(const Groups& groups, int64_t group, int64_t layer) {
  const int64_t slices = groups.slices;
  const acc length = static_cast<acc>(slices);
  const acc one = std::sqrt(acc(1) / length), two = std::sqrt(acc(2) / length);
  if (groups.transform == Transform::dct) {
    // cos(pi t / 2S), the same for t and 4S - t.
    const int64_t t = group * (2 * layer + 1) % (4 * slices), folded = t > 2 * slices ? 4 * slices - t : t;
    return {(group == 0 ? one : two) * unit_phase(static_cast<acc>(folded) / (2 * length)).re, acc(0)};
  }
  if (!groups.is_pair(group)) return {group > 0 && layer % 2 == 1 ? -one : one, acc(0)};
  const int64_t t = group * layer % slices, folded = 2 * t > slices ? t - slices : t;
  const PhaseOf<acc> unit = unit_phase(static_cast<acc>(2 * folded) / length);
  return {two * unit.re, two * unit.im};
}

}  // namespace tcurlora
