// The native backend, on every device: wide products by PyTorch's library, what lies between them by own kernels.
#include "cpu/middle.h"
#include "operator.h"

namespace tcurlora::native {
namespace {

using cpu::middle_backward;
using cpu::middle_forward;

Tensor rows_of(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

}  // namespace

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Stack& stack) {
  const Tensor x2 = rows_of(x);
  const Tensor h = at::mm(x2, stack.row.t());
  const Tensor m = middle_forward(h, stack);
  // The base as nn.Linear computes it, then the adapter accumulated onto it: a zero core gives the base bit for bit.
  Tensor y = at::linear(x2, weight, bias);
  y.view({-1, stack.out_features()}).addmm_(m.view({-1, stack.col.size(1)}), stack.col.t());
  return {x.dim() == 2 ? y : y.view(with_last(x.sizes(), weight.size(0))), h};
}

Gradients backward(
    const Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Tensor& weight, const Stack& stack,
    const Needs& needs) {
  const auto [needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row] = needs;
  Tensor dx = at::empty({0}, g.options()), dweight = at::empty({0}, g.options()), dbias = at::empty({0}, g.options());
  Tensor dcol = at::empty({0}, g.options()), dcore = at::empty({0}, stack.core.options());
  Tensor drow = at::empty({0}, g.options());
  const Tensor g2 = rows_of(g);
  const Tensor x2 = x.has_value() ? rows_of(*x) : Tensor();
  const auto saved_x = [&]() -> const Tensor& {
    TORCH_CHECK_VALUE(x2.defined(), "x was not saved for this gradient");
    return x2;
  };
  if (needs_weight) dweight = at::mm(g2.t(), saved_x());
  if (needs_bias) dbias = g2.sum(0);
  if (needs_x || needs_col || needs_core || needs_row) {
    const Tensor g_slices = g2.reshape({-1, stack.out_features()});
    const Tensor p = at::mm(g_slices, stack.col).view({-1, stack.num_slices, stack.col.size(1)});
    OptionalTensor hidden;
    if (needs_col || needs_core) hidden = h.has_value() ? *h : at::mm(saved_x(), stack.row.t());
    if (needs_col) dcol = at::mm(g_slices.t(), middle_forward(*hidden, stack).view({-1, stack.col.size(1)}));
    const auto [dh, du] = middle_backward(p, needs_core ? hidden : std::nullopt, stack, needs_x || needs_row);
    if (needs_core) dcore = du;
    if (needs_x) {
      dx = at::mm(g2, weight).addmm_(dh, stack.row);
      if (g.dim() != 2) dx = dx.view(with_last(g.sizes(), stack.row.size(1)));
    }
    if (needs_row) drow = at::mm(dh.t(), saved_x());
  }
  return {dx, dweight, dbias, dcol, dcore, drow};
}

}  // namespace tcurlora::native
