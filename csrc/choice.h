// Backends and transforms by name, and which backend "auto" takes, by device, dtype and sizes. Names and rules come from
// Python (tcurlora_ext/operator/backends/), where a backend or transform that needs no C++ is added.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace tcurlora {

struct Names {
  std::vector<std::string> backends{"eager", "native", "triton"};
  std::vector<std::string> transforms{"dft", "dct"};

  // The place of a name, or the number of names where it is none of them.
  static size_t index(const std::vector<std::string>& names, std::string_view name) {
    return std::find(names.begin(), names.end(), name) - names.begin();
  }
};

const Names& names();
// Set once, as the Python package is imported.
void set_names(Names names);

// The backend that is in C++; all others are operators that Python registers.
constexpr std::string_view kNative = "native";

// What a rule asks of one call: rows of x, q (the larger of r*S and c*S), numbers in the layer's weight.
using Sizes = std::array<int64_t, 3>;

struct Rule {
  size_t backend;                      // its place among the names
  std::vector<at::ScalarType> dtypes;  // empty: all
  Sizes low, high;                     // both included

  bool matches(at::ScalarType dtype, const Sizes& sizes) const;
};

// For one device: the rules in force, first match wins, and why each backend does not work ("" where it does).
struct Choices {
  std::vector<Rule> rules;
  std::vector<std::string> missing;
};

// Asked once a device, when it first computes. Without one, as in a program without Python, the native kernels are taken.
void set_choices(std::function<Choices(at::Device)> provider);

// The place of the backend of one call. Throws for a name that is unknown and for a backend that does not work on the
// device.
size_t choose(std::string_view name, at::Device device, at::ScalarType dtype, const Sizes& sizes);

}  // namespace tcurlora
