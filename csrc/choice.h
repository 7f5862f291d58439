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

  // The index of a name, or the number of names for an unknown name.
  static size_t index(const std::vector<std::string>& names, std::string_view name) {
    return std::find(names.begin(), names.end(), name) - names.begin();
  }
};

const Names& names();
// Set once, when the Python package is imported.
void set_names(Names names);

// The backend implemented in C++; all others are operators that Python registers.
constexpr std::string_view kNative = "native";

// The sizes of a call that rules depend on: rows of x, q (the larger of r*S and c*S), elements of the layer's weight.
using Sizes = std::array<int64_t, 3>;

struct Rule {
  size_t backend;                      // its index among the names
  std::vector<at::ScalarType> dtypes;  // empty: all
  Sizes low, high;                     // both included

  bool matches(at::ScalarType dtype, const Sizes& sizes) const;
};

// For one device: the rules, of which the first match decides, and why each backend does not work ("" where it works).
struct Choices {
  std::vector<Rule> rules;
  std::vector<std::string> missing;
};

// Called once per device, at its first call. Without a provider, as in a program without Python, "auto" is native.
void set_choices(std::function<Choices(at::Device)> provider);

// The index of the backend for one call. Throws for an unknown name and for a backend that does not work on the
// device.
size_t choose(std::string_view name, at::Device device, at::ScalarType dtype, const Sizes& sizes);

}  // namespace tcurlora
