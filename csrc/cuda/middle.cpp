// Calls the kernels of kernels.h, with pointers and sizes from tensors.
#include "middle.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "tensors.h"

namespace tcurlora::cuda {
namespace {

// The core in the dtype that the kernels read; it is not copied if it has that dtype already.
Tensor core_for(const Tensor& tensor, const Stack& stack) {
  return stack.core.to(accumulation_of(tensor)).contiguous();
}

Sizes sizes_of(int64_t tokens, const Stack& stack) {
  // The phases of all n slices and the sums of one tile have to fit into 48 KiB of shared memory.
  constexpr int64_t most = 3000;
  TORCH_CHECK_VALUE(
      stack.num_slices <= most, "a layer of ", stack.num_slices, " slices, the CUDA kernels take at most ", most);
  const auto small = [](int64_t number) { return static_cast<int>(number); };
  return {tokens, small(stack.slices()), small(stack.c()), small(stack.r()), small(stack.first_slice),
          small(stack.num_slices), stack.transform, stack.scale};
}

Tensor hidden_gradient(const Tensor& p, const Tensor& core, const Sizes& sizes) {
  Tensor dh = at::empty({sizes.tokens, sizes.hidden()}, p.options());
  C10_CUDA_CHECK(launch_middle_backward(
      element_of("p", p), sizes, p.const_data_ptr(), core.const_data_ptr(), dh.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return dh;
}

Tensor core_gradient(const Tensor& p, const Tensor& h, const Tensor& core, const Sizes& sizes) {
  Tensor gradient = at::empty(core.sizes(), core.options());
  Tensor workspace = at::empty({core_gradient_workspace(sizes)}, h.options().dtype(accumulation_of(h)));
  C10_CUDA_CHECK(launch_core_gradient(
      element_of("h", h), element_of("core", core), sizes, p.const_data_ptr(), h.const_data_ptr(),
      workspace.mutable_data_ptr(), gradient.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace

Tensor middle_forward(const Tensor& h, const Stack& stack) {
  const c10::cuda::CUDAGuard guard(h.device());
  const Tensor dense = h.contiguous(), core = core_for(h, stack);
  const Sizes sizes = sizes_of(h.size(0), stack);
  Tensor m = at::empty({sizes.tokens * stack.num_slices, sizes.columns()}, h.options());
  if (core.numel() == 0) return m.zero_();
  C10_CUDA_CHECK(launch_middle_forward(
      element_of("h", h), sizes, dense.const_data_ptr(), core.const_data_ptr(), m.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return m;
}

std::tuple<Tensor, Tensor> middle_backward(
    const Tensor& p, const OptionalTensor& h, const Stack& stack, bool needs_h) {
  const c10::cuda::CUDAGuard guard(p.device());
  const Sizes sizes = sizes_of(p.size(0) / stack.num_slices, stack);
  const Tensor dense = p.contiguous();
  Tensor dh, dcore;
  if (stack.core.numel() == 0) {
    if (needs_h) dh = at::zeros({sizes.tokens, sizes.hidden()}, p.options());
    if (h.has_value()) dcore = at::zeros_like(stack.core);
    return {dh, dcore};
  }
  if (needs_h) dh = hidden_gradient(dense, core_for(p, stack), sizes);
  if (h.has_value()) dcore = core_gradient(dense, h->contiguous(), stack.core, sizes);
  return {dh, dcore};
}

}  // namespace tcurlora::cuda
