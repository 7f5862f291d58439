// tcurlora_ext._C: importing it registers the operators; it says what it was built with.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "torch.ops.tcurlora in C++";
  module.def("build", [] {
    pybind11::dict about;
    about["torch"] = TORCH_VERSION;
    about["compiler"] = compiler();
    about["kernels"] = pybind11::make_tuple("cpu");
    return about;
  });
}
