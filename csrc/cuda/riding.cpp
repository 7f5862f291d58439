// Calls the riding form's kernels of kernels.h, with pointers and sizes from tensors. csrc/riding/riding.h describes
// arguments and results. Kernels run on the current stream of the tensor's device, without waiting for it.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../riding/riding.h"
#include "tensors.h"

namespace tcurlora::cuda {
namespace {

// The adapter in the form that the kernels read, for a tensor of tokens; nothing is copied that has it already.
struct Operands {
  Tensor core, gain, columns;
  RidingSizes sizes;

  Operands(const Tensor& rows, const Riding& adapter)
      : core(adapter.own_core().to(accumulation_of(rows)).contiguous()),
        gain(adapter.gain.to(accumulation_of(rows)).contiguous()),
        columns(adapter.columns.contiguous()),
        sizes{rows.size(0), rows.size(1), rows.stride(0), static_cast<int>(adapter.c()),
              static_cast<int>(adapter.r()), adapter.scale} {}
};

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : tensor.contiguous();
}

Tensor hidden_gradient_of(const Tensor& g, const Operands& operands) {
  Tensor dh = at::empty({g.size(0), operands.sizes.r}, g.options());
  C10_CUDA_CHECK(launch_riding_backward(
      element_of("g", g), operands.sizes, g.const_data_ptr(), operands.core.const_data_ptr(),
      operands.gain.const_data_ptr(), operands.columns.const_data_ptr<int64_t>(), dh.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return dh;
}

// Zeros for all slices but the adapter's.
Tensor core_gradient_of(const Tensor& g, const Tensor& h, const Operands& operands, const Riding& adapter) {
  const Tensor& core = adapter.core;
  Tensor gradient =
      core.size(0) == 1 ? at::empty(core.sizes(), core.options()) : at::zeros(core.sizes(), core.options());
  Tensor workspace =
      at::empty({core_gradient_workspace(operands.sizes.one_slice())}, g.options().dtype(accumulation_of(g)));
  C10_CUDA_CHECK(launch_riding_core_gradient(
      element_of("g", g), element_of("core", core), operands.sizes, g.const_data_ptr(), h.const_data_ptr(),
      operands.gain.const_data_ptr(), operands.columns.const_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
      gradient.select(0, adapter.slice_index).mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return gradient;
}

}  // namespace

Tensor changed_input(const Tensor& x, const Tensor& h, const Riding& adapter) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor rows = with_dense_rows(x), dense = h.contiguous();
  const Operands operands(rows, adapter);
  Tensor changed = at::empty(x.sizes(), x.options());
  C10_CUDA_CHECK(launch_riding_forward(
      element_of("x", rows), operands.sizes, rows.const_data_ptr(), dense.const_data_ptr(),
      operands.core.const_data_ptr(), operands.gain.const_data_ptr(), operands.columns.const_data_ptr<int64_t>(),
      changed.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return changed;
}

std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Riding& adapter, bool needs_h) {
  const c10::cuda::CUDAGuard guard(g.device());
  const Tensor rows = with_dense_rows(g);
  Tensor dh, dcore;
  if (adapter.core.numel() == 0) {
    if (needs_h) dh = at::zeros({g.size(0), adapter.r()}, g.options());
    if (h.has_value()) dcore = at::zeros(adapter.core.sizes(), adapter.core.options());
    return {dh, dcore};
  }
  const Operands operands(rows, adapter);
  if (needs_h) dh = hidden_gradient_of(rows, operands);
  if (h.has_value()) dcore = core_gradient_of(rows, h->contiguous(), operands, adapter);
  return {dh, dcore};
}

}  // namespace tcurlora::cuda
