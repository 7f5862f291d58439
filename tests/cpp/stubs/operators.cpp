// torch.ops.tcurlora_on_cpu: the part of the native backend that computes on a GPU, for CPU tensors. Linked in place of
// csrc/device.cpp and csrc/cpu, with the CUDA sources compiled against the headers of this folder. The sources that need
// torch are included, so that its headers are read once. Of the riding form only what csrc/riding calls is here.
#include <torch/library.h>

#include "../../../csrc/cuda/middle.cpp"
#include "../../../csrc/cuda/riding.cpp"
#include "../../../csrc/native.cpp"

namespace tcurlora {

bool on_gpu(const Tensor&) { return true; }

namespace cpu {

Tensor middle_forward(const Tensor&, const Stack&) { TORCH_CHECK(false, "a kernel for the CPU was asked for"); }

std::tuple<Tensor, Tensor> middle_backward(const Tensor&, const OptionalTensor&, const Stack&, bool) {
  TORCH_CHECK(false, "a kernel for the CPU was asked for");
}

}  // namespace cpu

namespace {

Stack stack_of(TCURLORA_FACTORS, c10::string_view transform) {
  return {TCURLORA_FACTOR_NAMES, transform == "dct" ? Transform::dct : Transform::dft};
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, TCURLORA_FACTORS, c10::string_view transform) {
  return native::forward(x, weight, bias, stack_of(TCURLORA_FACTOR_NAMES, transform));
}

Gradients backward(
    const Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Tensor& weight, TCURLORA_FACTORS,
    Needs needs, c10::string_view transform) {
  return native::backward(g, x, h, weight, stack_of(TCURLORA_FACTOR_NAMES, transform), needs);
}

Tensor changed_input(const Tensor& x, const Tensor& h, TCURLORA_RIDING_ADAPTER) {
  return cuda::changed_input(x, h, {TCURLORA_RIDING_ADAPTER_NAMES});
}

std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, TCURLORA_RIDING_ADAPTER, bool needs_h) {
  auto [dh, dcore] = cuda::changed_input_back(g, h, {TCURLORA_RIDING_ADAPTER_NAMES}, needs_h);
  return {dh.defined() ? dh : at::empty({0}), dcore.defined() ? dcore : at::empty({0})};
}

#define ADAPTER "Tensor columns, Tensor core, Tensor row, Tensor gain, int slice_index, float scale"
#define FACTORS "Tensor col, Tensor core, Tensor row, int first_slice, int num_slices, float scale"

// As composites, so that a dispatch mode in Python sees the operations inside.
TORCH_LIBRARY(tcurlora_on_cpu, library) {
  library.def("forward(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", str transform) -> (Tensor, Tensor)", forward);
  library.def(
      "backward(Tensor g, Tensor? x, Tensor? h, Tensor weight, " FACTORS
      ", bool[6] needs, str transform) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      backward);
  library.def("changed_input(Tensor x, Tensor h, " ADAPTER ") -> Tensor", changed_input);
  library.def(
      "changed_input_back(Tensor g, Tensor? h, " ADAPTER ", bool needs_h) -> (Tensor, Tensor)", changed_input_back);
}

}  // namespace
}  // namespace tcurlora
