// What the kernels have to compute, in double, from the definition in docs/maths.md and in complex numbers:
//
//   m_{l,k} = scale w exp(2 pi i k l / S) u_k h_k        u_k = u_re + i u_im, h_k = h_re + i h_im
//
// with w = sqrt(2/S) for a pair of blocks and sqrt(1/S) for the self-conjugate frequencies 0 and S/2, or for the DCT
// scale D[k, l] u_k h_k with the orthonormal DCT-II matrix D. The transpose and the gradient are those of this map.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

#include "../../csrc/cuda/sizes.h"

namespace tcurlora::cuda::definition {

using Numbers = std::vector<double>;
using Complex = std::complex<double>;

// A frequency: its block of real parts, its block of imaginary parts (-1: none), and what layer l multiplies it by.
struct Frequency {
  int64_t real;
  int64_t imaginary;
  int64_t k;
};

inline std::vector<Frequency> frequencies(const Sizes& sizes) {
  std::vector<Frequency> all;
  const int64_t S = sizes.slices;
  if (sizes.transform == Transform::dct) {
    for (int64_t k = 0; k < S; ++k) all.push_back({k, -1, k});
    return all;
  }
  int64_t block = 0;
  for (int64_t k = 0; 2 * k <= S; ++k) {
    const bool self_conjugate = k == 0 || 2 * k == S;
    all.push_back({block, self_conjugate ? -1 : block + 1, k});
    block += self_conjugate ? 1 : 2;
  }
  return all;
}

inline Complex factor(const Sizes& sizes, const Frequency& frequency, int64_t layer) {
  const double pi = std::acos(-1.0), S = sizes.slices;
  if (sizes.transform == Transform::dct) {
    return sizes.scale * std::sqrt((frequency.k == 0 ? 1 : 2) / S) * std::cos(pi / S * frequency.k * (layer + 0.5));
  }
  const double weight = std::sqrt((frequency.imaginary < 0 ? 1 : 2) / S);
  return sizes.scale * weight * std::polar(1.0, 2 * pi * frequency.k * layer / S);
}

// Number `index` of a frequency, in an array whose blocks are `width` numbers.
inline Complex at(const Numbers& array, int64_t offset, const Frequency& f, int64_t width, int64_t index) {
  return {array[offset + f.real * width + index], f.imaginary < 0 ? 0.0 : array[offset + f.imaginary * width + index]};
}
inline void add(Numbers& array, int64_t offset, const Frequency& f, int64_t width, int64_t index, Complex value) {
  array[offset + f.real * width + index] += value.real();
  if (f.imaginary >= 0) array[offset + f.imaginary * width + index] += value.imag();
}

// Calls visit(token, slice, frequency, its factor) for all of them.
template <typename Visit>
void for_each(const Sizes& sizes, const Visit& visit) {
  for (const Frequency& frequency : frequencies(sizes)) {
    for (int64_t j = 0; j < sizes.num_slices; ++j) {
      const Complex phase = factor(sizes, frequency, sizes.first_slice + j);
      for (int64_t t = 0; t < sizes.tokens; ++t) visit(t, j, frequency, phase);
    }
  }
}

inline Numbers middle_forward(const Sizes& sizes, const Numbers& h, const Numbers& core) {
  Numbers m(sizes.tokens * sizes.num_slices * sizes.columns(), 0.0);
  for_each(sizes, [&](int64_t t, int64_t j, const Frequency& f, Complex phase) {
    for (int64_t a = 0; a < sizes.c; ++a) {
      Complex sum = 0;
      for (int64_t b = 0; b < sizes.r; ++b) {
        sum += at(core, 0, f, sizes.c * sizes.r, a * sizes.r + b) * at(h, t * sizes.hidden(), f, sizes.r, b);
      }
      add(m, (t * sizes.num_slices + j) * sizes.columns(), f, sizes.c, a, phase * sum);
    }
  });
  return m;
}

// The transpose of a complex product as a real map is the product with the conjugate.
inline Numbers middle_backward(const Sizes& sizes, const Numbers& p, const Numbers& core) {
  Numbers dh(sizes.tokens * sizes.hidden(), 0.0);
  for_each(sizes, [&](int64_t t, int64_t j, const Frequency& f, Complex phase) {
    for (int64_t a = 0; a < sizes.c; ++a) {
      const Complex value = at(p, (t * sizes.num_slices + j) * sizes.columns(), f, sizes.c, a);
      for (int64_t b = 0; b < sizes.r; ++b) {
        const Complex u = at(core, 0, f, sizes.c * sizes.r, a * sizes.r + b);
        add(dh, t * sizes.hidden(), f, sizes.r, b, std::conj(phase * u) * value);
      }
    }
  });
  return dh;
}

inline Numbers core_gradient(const Sizes& sizes, const Numbers& p, const Numbers& h) {
  Numbers du(sizes.core(), 0.0);
  for_each(sizes, [&](int64_t t, int64_t j, const Frequency& f, Complex phase) {
    for (int64_t a = 0; a < sizes.c; ++a) {
      const Complex value = at(p, (t * sizes.num_slices + j) * sizes.columns(), f, sizes.c, a);
      for (int64_t b = 0; b < sizes.r; ++b) {
        const Complex hidden = at(h, t * sizes.hidden(), f, sizes.r, b);
        add(du, 0, f, sizes.c * sizes.r, a * sizes.r + b, std::conj(phase * hidden) * value);
      }
    }
  });
  return du;
}

}  // namespace tcurlora::cuda::definition
