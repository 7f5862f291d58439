// The middle product of a TCUR layer, block by block: arithmetic that CPU and CUDA share. No torch header.
//
// The core (S, c, r) is in the coordinates of the slice transform (tcurlora_ext/maths/packing.py). Its S blocks are, for
// the DFT, frequency 0, then the real and the imaginary part of 1, 2, ..., and for even S frequency S/2; for the DCT S
// blocks that stand alone. A layer l puts a phase on them:
//
//   alone   B = w u                                w = (+-1)^l / sqrt(S), for the DCT the entry (block, l) of its matrix
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

// Phase and weight of a group for layer l: a pair multiplies by (re + i im), a block alone by re.
struct Phase {
  double re;
  double im;
};

TCURLORA_HD Phase phase_of(const Groups& groups, int64_t group, int64_t layer) {
  const double pi = 3.14159265358979323846;
  const double slices = static_cast<double>(groups.slices);
  if (groups.transform == Transform::dct) {
    const double angle = pi / slices * static_cast<double>(group) * (static_cast<double>(layer) + 0.5);
    return {std::cos(angle) * std::sqrt((group == 0 ? 1.0 : 2.0) / slices), 0.0};
  }
  if (!groups.is_pair(group)) {
    const double sign = group > 0 && layer % 2 == 1 ? -1.0 : 1.0;
    return {sign / std::sqrt(slices), 0.0};
  }
  // k*l mod S in integers: the angle stays exact for any S and l.
  const double angle = 2.0 * pi / slices * static_cast<double>((group * layer) % groups.slices);
  const double weight = std::sqrt(2.0 / slices);
  return {weight * std::cos(angle), weight * std::sin(angle)};
}

}  // namespace tcurlora
