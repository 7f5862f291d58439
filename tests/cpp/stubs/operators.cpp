// torch.ops.tcurlora_on_cpu: the part of the native backend that computes on a GPU, for CPU tensors. Linked in place of
// csrc/device.cpp and csrc/cpu, with the CUDA sources compiled against the headers of this folder. The sources that need
// torch are included, so that its headers are read once.
#include <torch/library.h>

#include "../../../csrc/cuda/middle.cpp"
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

#define FACTORS "Tensor col, Tensor core, Tensor row, int first_slice, int num_slices, float scale"

// As composites, so that a dispatch mode in Python sees the operations inside.
TORCH_LIBRARY(tcurlora_on_cpu, library) {
  library.def("forward(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", str transform) -> (Tensor, Tensor)", forward);
  library.def(
      "backward(Tensor g, Tensor? x, Tensor? h, Tensor weight, " FACTORS
      ", bool[6] needs, str transform) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      backward);
}

}  // namespace
}  // namespace tcurlora
