// tcurlora_ext._C: importing it registers the operators. It reports how it was built and takes the table of choices.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <c10/core/ScalarType.h>
#include <torch/version.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "choice.h"

#ifdef TCURLORA_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

namespace py = pybind11;
using namespace tcurlora;

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build() {
  py::dict about;
  about["torch"] = TORCH_VERSION;
  about["compiler"] = compiler();
#ifdef TCURLORA_CUDA
  about["kernels"] = py::make_tuple("cpu", "cuda");
  about["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  about["cuda architectures"] = TCURLORA_CUDA_ARCHITECTURES;
#else
  about["kernels"] = py::make_tuple("cpu");
#endif
  return about;
}

at::ScalarType dtype_named(const std::string& name) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    if (c10::getDtypeNames(dtype).first == name) return dtype;
  }
  TORCH_CHECK_VALUE(false, "dtype ", name, ", expected float64, float32, bfloat16 or float16");
}

// As tcurlora_ext/operator/backends/choice.py gives them: (backend, dtypes, lowest sizes, highest sizes).
using PlainRule = std::tuple<size_t, std::vector<std::string>, Sizes, Sizes>;
using PlainChoices = std::pair<std::vector<PlainRule>, std::vector<std::string>>;

Choices as_choices(const PlainChoices& plain) {
  Choices choices{{}, plain.second};
  for (const auto& [backend, names, low, high] : plain.first) {
    Rule rule{backend, {}, low, high};
    for (const auto& name : names) rule.dtypes.push_back(dtype_named(name));
    choices.rules.push_back(std::move(rule));
  }
  return choices;
}

void set_choices_from_python(const py::function& provider) {
  // Never released: Python is finalised before the static objects of this library are destroyed.
  auto* kept = new py::function(provider);
  set_choices([kept](at::Device device) {
    const py::gil_scoped_acquire held;
    return as_choices((*kept)(device.str()).cast<PlainChoices>());
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "torch.ops.tcurlora in C++";
  module.def("build", build, "What the extension was built with.");
  module.def(
      "set_names",
      [](std::vector<std::string> backends, std::vector<std::string> transforms) {
        set_names({std::move(backends), std::move(transforms)});
      },
      "The backends and the transforms, by the names that the operators take.");
  module.def("set_choices", set_choices_from_python, "Where the rules of a device come from: a function of its name.");
  module.def(
      "choose",
      [](const std::string& name, const std::string& device, const std::string& dtype, const Sizes& sizes) {
        return names().backends[choose(name, at::Device(device), dtype_named(dtype), sizes)];
      },
      "The backend of a call.");
}
