// Tensors to pointers and sizes for the kernels of kernels.h.
#include "middle.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"

namespace tcurlora::cuda {
namespace {

Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::float32;
    case at::kDouble: return Element::float64;
    case at::kHalf: return Element::float16;
    case at::kBFloat16: return Element::bfloat16;
    default:
      TORCH_CHECK_VALUE(
          false, name, " is ", tensor.scalar_type(), ", the CUDA kernels take float32, float64, float16 and bfloat16");
  }
}

// The type that elements of this tensor are summed in.
at::ScalarType accumulation_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The core as the kernels read it; one of float32 stays where it is.
Tensor core_for(const Tensor& tensor, const Stack& stack) {
  return stack.core.to(accumulation_of(tensor)).contiguous();
}

Sizes sizes_of(int64_t tokens, const Stack& stack) {
  // The phases of all n slices lie in 48 KiB of shared memory, beside which the sums of one tile have to fit.
  constexpr int64_t most = 3000;
  TORCH_CHECK_VALUE(
      stack.num_slices <= most, "a layer of ", stack.num_slices, " slices, the CUDA kernels take at most ", most);
  const auto small = [](int64_t number) { return static_cast<int>(number); };
  return {tokens, small(stack.slices()), small(stack.c()), small(stack.r()), small(stack.first_slice),
          small(stack.num_slices), stack.transform, stack.scale};
}

}  // namespace

Tensor middle_forward(const Tensor& h, const Stack& stack) {
  const c10::cuda::CUDAGuard guard(h.device());
  const Tensor dense = h.contiguous(), core = core_for(h, stack);
  Tensor m = at::empty({h.size(0), stack.num_slices, stack.c() * stack.slices()}, h.options());
  if (core.numel() == 0) return m.zero_();
  C10_CUDA_CHECK(launch_middle_forward(
      element_of("h", h), sizes_of(h.size(0), stack), dense.const_data_ptr(), core.const_data_ptr(),
      m.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return m;
}

Tensor middle_backward(const Tensor& p, const Stack& stack) {
  const c10::cuda::CUDAGuard guard(p.device());
  const Tensor dense = p.contiguous(), core = core_for(p, stack);
  Tensor dh = at::empty({p.size(0), stack.r() * stack.slices()}, p.options());
  if (core.numel() == 0) return dh.zero_();
  C10_CUDA_CHECK(launch_middle_backward(
      element_of("p", p), sizes_of(p.size(0), stack), dense.const_data_ptr(), core.const_data_ptr(),
      dh.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return dh;
}

Tensor core_gradient(const Tensor& p, const Tensor& h, const Stack& stack) {
  const c10::cuda::CUDAGuard guard(h.device());
  Tensor gradient = at::empty(stack.core.sizes(), stack.core.options());
  if (gradient.numel() == 0) return gradient;
  const Tensor dense_p = p.contiguous(), dense_h = h.contiguous();
  const Sizes sizes = sizes_of(h.size(0), stack);
  Tensor workspace = at::empty({core_gradient_workspace(sizes)}, h.options().dtype(accumulation_of(h)));
  C10_CUDA_CHECK(launch_core_gradient(
      element_of("h", h), element_of("core", stack.core), sizes, dense_p.const_data_ptr(), dense_h.const_data_ptr(),
      workspace.mutable_data_ptr(), gradient.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace tcurlora::cuda
