// Which backend "auto" takes, by device, dtype and sizes. The rules come from tcurlora_ext/operator/choice.py.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace tcurlora {

enum class Backend : int { eager = 0, native = 1, triton = 2 };
constexpr std::array<std::string_view, 3> kBackends{"eager", "native", "triton"};

// What a rule asks of one call: rows of x, q (the larger of r*S and c*S), numbers in the layer's weight.
using Sizes = std::array<int64_t, 3>;

struct Rule {
  Backend backend;
  std::vector<at::ScalarType> dtypes;  // empty: all
  Sizes low, high;                     // both included

  bool matches(at::ScalarType dtype, const Sizes& sizes) const;
};

// For one device: the rules in force, first match wins, and why each backend does not work ("" where it does).
struct Choices {
  std::vector<Rule> rules;
  std::array<std::string, 3> missing;
};

// Asked once a device, when it first computes. Without one, as in a program without Python, the native kernels are taken.
void set_choices(std::function<Choices(at::Device)> provider);

// The backend of one call. Throws for a name that is unknown and for a backend that does not work on the device.
Backend choose(std::string_view name, at::Device device, at::ScalarType dtype, const Sizes& sizes);

}  // namespace tcurlora
