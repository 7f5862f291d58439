// The block-diagonal arithmetic of 8 tokens. In complex notation for a pair (csrc/middle.h), phases phi_j and p_j, m_j
// for the n slices:
//
//   forward    z = u h              m_j = phi_j z
//   backward   P = sum_j conj(phi_j) p_j        dh = u^H P        du = sum over tokens of P h^H
//
// so that more slices only cost element-wise work. A single block is the same in real numbers. Arrays of S blocks have
// the real and the imaginary part of a pair as two blocks, and one vector of tokens per entry.
#pragma once

#include <algorithm>

#include "../middle.h"
#include "lanes.h"

namespace tcurlora::cpu {

// Outputs of a product whose sums are kept in registers: for a pair 8 vectors, which hide the latency of the additions.
constexpr int64_t kOutputs = 4;

// u of one group: entry (output, input) at re[output * step_out + input * step_in]; im is null for a single block.
template <typename acc>
struct Block {
  const acc* re;
  const acc* im;
  int64_t step_out, step_in;
};

// out[o] = sum_i u[o, i] in[i] for `count` outputs; with `conjugate`, conj(u) in place of u. The imaginary parts of
// `in` and `out` are `inputs` and `outputs` vectors after the real parts.
template <int64_t count, bool pair, bool conjugate, typename acc>
TCURLORA_INLINE void multiply_some(
    const Block<acc>& u, const Vector<acc>* in, int64_t inputs, Vector<acc>* out, int64_t outputs) {
  Vector<acc> re[count] = {}, im[count] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    const Vector<acc> x = in[i], y = pair ? in[inputs + i] : Vector<acc>{};
#pragma GCC unroll 4
    for (int64_t o = 0; o < count; ++o) {
      const int64_t at = o * u.step_out + i * u.step_in;
      re[o] += x * u.re[at];
      if constexpr (pair) {
        im[o] += y * u.re[at];
        re[o] = conjugate ? re[o] + y * u.im[at] : re[o] - y * u.im[at];
        im[o] = conjugate ? im[o] - x * u.im[at] : im[o] + x * u.im[at];
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t o = 0; o < count; ++o) {
    out[o] = re[o];
    if constexpr (pair) out[outputs + o] = im[o];
  }
}

template <bool pair, bool conjugate, typename acc>
TCURLORA_INLINE void multiply_block(
    Block<acc> u, const Vector<acc>* in, int64_t inputs, Vector<acc>* out, int64_t outputs) {
  const auto advance = u.step_out;
  int64_t o = 0;
  for (; o + kOutputs <= outputs; o += kOutputs) {
    multiply_some<kOutputs, pair, conjugate>(u, in, inputs, out + o, outputs);
    u.re += kOutputs * advance;
    if constexpr (pair) u.im += kOutputs * advance;
  }
  for (; o < outputs; ++o) {
    multiply_some<1, pair, conjugate>(u, in, inputs, out + o, outputs);
    u.re += advance;
    if constexpr (pair) u.im += advance;
  }
}

// z = u h, or dh = u^H P with `adjoint`. u is (S, c, r); `in` and `out` have S blocks.
template <bool adjoint, typename acc>
TCURLORA_INLINE void multiply(
    const Groups& groups, const acc* u, int64_t c, int64_t r, const Vector<acc>* in, Vector<acc>* out) {
  const int64_t inputs = adjoint ? c : r, outputs = adjoint ? r : c;
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t first = groups.first_block(g);
    const acc* re = u + first * c * r;
    const Block<acc> block{re, re + c * r, adjoint ? 1 : r, adjoint ? r : 1};
    if (groups.is_pair(g)) {
      multiply_block<true, adjoint>(block, in + first * inputs, inputs, out + first * outputs, outputs);
    } else {
      multiply_block<false, adjoint>(block, in + first * inputs, inputs, out + first * outputs, outputs);
    }
  }
}

// m = phi z of one slice, in S blocks of c.
template <typename acc>
TCURLORA_INLINE void rotate(
    const Groups& groups, const Phase* phases, int64_t c, const Vector<acc>* z, Vector<acc>* m) {
  for (int64_t g = 0; g < groups.count(); ++g, ++phases) {
    const int64_t first = groups.first_block(g) * c;
    const acc re = static_cast<acc>(phases->re), im = static_cast<acc>(phases->im);
    for (int64_t a = first; a < first + c; ++a) {
      if (groups.is_pair(g)) {
        m[a] = re * z[a] - im * z[a + c];
        m[a + c] = im * z[a] + re * z[a + c];
      } else {
        m[a] = re * z[a];
      }
    }
  }
}

// P += conj(phi) p of one slice, in S blocks of c.
template <typename acc>
TCURLORA_INLINE void rotate_back(
    const Groups& groups, const Phase* phases, int64_t c, const Vector<acc>* p, Vector<acc>* sum) {
  for (int64_t g = 0; g < groups.count(); ++g, ++phases) {
    const int64_t first = groups.first_block(g) * c;
    const acc re = static_cast<acc>(phases->re), im = static_cast<acc>(phases->im);
    for (int64_t a = first; a < first + c; ++a) {
      if (groups.is_pair(g)) {
        sum[a] += re * p[a] + im * p[a + c];
        sum[a + c] += re * p[a + c] - im * p[a];
      } else {
        sum[a] += re * p[a];
      }
    }
  }
}

// du[a, b] += sum over tokens of P[a] conj(h[b]), for `rows` x `columns` entries of one group: at most 2 x 2, whose real
// and imaginary sums are 8 vectors in registers. `blocks` blocks of 8 tokens, `step_c` and `step_r` vectors apart.
template <int64_t rows, int64_t columns, bool pair, typename acc>
TCURLORA_INLINE void outer_some(
    const Vector<acc>* P, int64_t step_c, const Vector<acc>* h, int64_t step_r, int64_t blocks, int64_t c, int64_t r,
    acc* du) {
  static_assert(2 * rows * columns <= kLanes);
  Vector<acc> sums[kLanes] = {};
  for (int64_t k = 0; k < blocks; ++k, P += step_c, h += step_r) {
#pragma GCC unroll 2
    for (int64_t a = 0; a < rows; ++a) {
#pragma GCC unroll 2
      for (int64_t b = 0; b < columns; ++b) {
        Vector<acc>&re = sums[a * columns + b], &im = sums[kLanes / 2 + a * columns + b];
        re += P[a] * h[b];
        if constexpr (pair) {
          re += P[c + a] * h[r + b];
          im += P[c + a] * h[b];
          im -= P[a] * h[r + b];
        }
      }
    }
  }
  // Lane i of the sum of the transposed vectors is the sum of the lanes of vector i.
  transpose<acc>(sums);
  const Vector<acc> total =
      ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
#pragma GCC unroll 2
  for (int64_t a = 0; a < rows; ++a) {
#pragma GCC unroll 2
    for (int64_t b = 0; b < columns; ++b) {
      du[a * r + b] += total[a * columns + b];
      if constexpr (pair) du[c * r + a * r + b] += total[kLanes / 2 + a * columns + b];
    }
  }
}

template <bool pair, typename acc>
TCURLORA_INLINE void outer_block(
    const Vector<acc>* P, int64_t step_c, const Vector<acc>* h, int64_t step_r, int64_t blocks, int64_t c, int64_t r,
    acc* du) {
  for (int64_t a = 0; a < c; a += 2) {
    for (int64_t b = 0; b < r; b += 2) {
      acc* to = du + a * r + b;
      if (a + 1 < c && b + 1 < r) {
        outer_some<2, 2, pair>(P + a, step_c, h + b, step_r, blocks, c, r, to);
      } else if (a + 1 < c) {
        outer_some<2, 1, pair>(P + a, step_c, h + b, step_r, blocks, c, r, to);
      } else if (b + 1 < r) {
        outer_some<1, 2, pair>(P + a, step_c, h + b, step_r, blocks, c, r, to);
      } else {
        outer_some<1, 1, pair>(P + a, step_c, h + b, step_r, blocks, c, r, to);
      }
    }
  }
}

// du (S, c, r) += sum over tokens of P h^H. P (blocks, S*c) and h (blocks, S*r) have one vector of 8 tokens per entry.
template <typename acc>
TCURLORA_INLINE void outer(
    const Groups& groups, const Vector<acc>* P, const Vector<acc>* h, int64_t blocks, int64_t c, int64_t r, acc* du) {
  const int64_t step_c = groups.slices * c, step_r = groups.slices * r;
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t first = groups.first_block(g);
    if (groups.is_pair(g)) {
      outer_block<true>(P + first * c, step_c, h + first * r, step_r, blocks, c, r, du + first * c * r);
    } else {
      outer_block<false>(P + first * c, step_c, h + first * r, step_r, blocks, c, r, du + first * c * r);
    }
  }
}

}  // namespace tcurlora::cpu
