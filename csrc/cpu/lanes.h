// Tokens as the lanes of vectors: vectorisation does not depend on the rank, and code reads like that for one token.
//
// A row-major matrix (tokens, columns) is read into one vector of 8 tokens per column, by transposing 8 x 8 elements at
// a time in registers. Sums are in at least float32 for every dtype in memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// A function that is always inlined, and so compiled for its caller's instruction set.
#define TCURLORA_INLINE inline __attribute__((always_inline))

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TCURLORA_SHUFFLES
#endif
#endif

namespace tcurlora::cpu {

constexpr int64_t kLanes = 8;

template <typename scalar>
using acc_t = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// 8 elements; the compiler splits them where the instruction set has shorter vectors. The alignment is explicit because
// gcc would otherwise assume 16 bytes in functions for SSE and 32 bytes in functions for AVX, for the same memory.
template <typename acc>
struct Lanes {
  typedef acc Vector __attribute__((vector_size(kLanes * sizeof(acc)), aligned(kLanes * sizeof(acc))));
  Vector lanes;
};
template <typename acc>
using Vector = typename Lanes<acc>::Vector;

// Transposes in place: rows[i][j] <-> rows[j][i].
template <typename acc>
TCURLORA_INLINE void transpose(Vector<acc>* rows) {
#ifdef TCURLORA_SHUFFLES
  Vector<acc> pairs[kLanes], fours[kLanes];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kLanes; i += 2) {
    pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < 2; ++j) {
      fours[i + 2 * j] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    rows[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    rows[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const acc other = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = other;
    }
  }
#endif
}

template <typename scalar>
TCURLORA_INLINE void read(const scalar* from, Vector<acc_t<scalar>>& row) {
  acc_t<scalar> wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = static_cast<acc_t<scalar>>(from[i]);
  std::memcpy(&row, wide, sizeof(row));
}

template <typename scalar>
TCURLORA_INLINE void write(const Vector<acc_t<scalar>>& row, scalar* to) {
  acc_t<scalar> wide[kLanes];
  std::memcpy(wide, &row, sizeof(row));
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<scalar>(wide[i]);
}

// Loads `tokens` <= 8 rows, `step` elements apart, into one vector per column; lanes without a token are zero.
template <typename scalar>
TCURLORA_INLINE void load(
    const scalar* from, int64_t step, int64_t tokens, int64_t columns, Vector<acc_t<scalar>>* to) {
  using acc = acc_t<scalar>;
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    Vector<acc> block[kLanes] = {};
#pragma GCC unroll 8
    for (int64_t t = 0; t < kLanes; ++t) {
      if (t < tokens) read(from + t * step + column, block[t]);
    }
    transpose<acc>(block);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes; ++i) to[column + i] = block[i];
  }
  for (; column < columns; ++column) {
    acc rest[kLanes] = {};
    for (int64_t t = 0; t < tokens; ++t) rest[t] = static_cast<acc>(from[t * step + column]);
    std::memcpy(to + column, rest, sizeof(rest));
  }
}

// The inverse of load().
template <typename scalar>
TCURLORA_INLINE void store(
    const Vector<acc_t<scalar>>* from, int64_t columns, scalar* to, int64_t step, int64_t tokens) {
  using acc = acc_t<scalar>;
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    Vector<acc> block[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes; ++i) block[i] = from[column + i];
    transpose<acc>(block);
#pragma GCC unroll 8
    for (int64_t t = 0; t < kLanes; ++t) {
      if (t < tokens) write(block[t], to + t * step + column);
    }
  }
  for (; column < columns; ++column) {
    acc rest[kLanes];
    std::memcpy(rest, from + column, sizeof(rest));
    for (int64_t t = 0; t < tokens; ++t) to[t * step + column] = static_cast<scalar>(rest[t]);
  }
}

}  // namespace tcurlora::cpu
