// Checks that are counted, arrays with guard zones, and comparisons with the definition.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/elements.h"
#include "definition.h"

namespace tcurlora::cuda {

using definition::Numbers;

inline int checks = 0, failures = 0;

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// An array between two guard zones, NaN all over: what is not written shows, and so does what is read or written
// outside. It starts `shift` elements after an address that is aligned to 16 bytes.
template <typename scalar>
class Guarded {
 public:
  static constexpr int64_t guard = 64;

  explicit Guarded(int64_t size, int shift = 0) : shift_(shift), memory_(size + 2 * guard) {
    std::memset(static_cast<void*>(memory_.data()), 0xff, bytes());
  }
  Guarded(const Numbers& numbers, int shift = 0) : Guarded(static_cast<int64_t>(numbers.size()), shift) {
    for (size_t i = 0; i < numbers.size(); ++i) data()[i] = Narrow<scalar>::from(numbers[i]);
  }
  scalar* data() { return memory_.data() + guard + shift_; }
  int64_t size() const { return static_cast<int64_t>(memory_.size()) - 2 * guard; }
  size_t bytes() const { return memory_.size() * sizeof(scalar); }

  Numbers numbers() {
    Numbers all(size());
    for (int64_t i = 0; i < size(); ++i) all[i] = static_cast<double>(widened(data()[i]));
    return all;
  }
  bool same_bits(const Guarded& other) const {
    return std::memcmp(static_cast<const void*>(memory_.data()), other.memory_.data(), bytes()) == 0;
  }
  bool guards_untouched() const {
    const auto* all = reinterpret_cast<const unsigned char*>(memory_.data());
    const size_t before = (guard + shift_) * sizeof(scalar), after = (guard - shift_) * sizeof(scalar);
    const auto untouched = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(all, all + before, untouched) && std::all_of(all + bytes() - after, all + bytes(), untouched);
  }

 private:
  int shift_;
  std::vector<scalar> memory_;
};

inline Numbers random_numbers(int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  Numbers numbers(size);
  for (double& number : numbers) number = uniform(generator);
  return numbers;
}

// Relative accuracy of a stored number, half a unit in its last place; that of sums, relative to the largest.
template <typename scalar>
struct Accuracy {
  static constexpr double stored = std::is_same_v<scalar, double> ? 0 : std::is_same_v<scalar, float> ? 0 : 0x1p-11;
  static constexpr double summed = std::is_same_v<scalar, double> ? 1e-12 : 1e-5;
};
#if TCURLORA_HALVES
template <>
struct Accuracy<__nv_bfloat16> {
  static constexpr double stored = 0x1p-8, summed = 1e-5;
};
#endif

template <typename scalar, typename stored = scalar>
void expect_close(const Numbers& found, const Numbers& expected, const std::string& what) {
  double largest = std::numeric_limits<double>::min(), worst = 0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double allowed = Accuracy<stored>::stored * std::abs(expected[i]) + Accuracy<scalar>::summed * largest;
    const double excess = std::abs(found[i] - expected[i]) / allowed;
    worst = std::isnan(excess) ? std::numeric_limits<double>::infinity() : std::max(worst, excess);
  }
  expect(found.size() == expected.size() && worst <= 1, what + ": error " + std::to_string(worst) + " of the allowed");
}

template <typename scalar>
const char* type_name() {
  if constexpr (std::is_same_v<scalar, float>) return "float32";
  if constexpr (std::is_same_v<scalar, double>) return "float64";
  return sizeof(widened(scalar{})) == 4 && Accuracy<scalar>::stored == 0x1p-8 ? "bfloat16" : "float16";
}

}  // namespace tcurlora::cuda
