// The native backend on every device: the wide products by PyTorch's libraries, the middle product by own kernels.
#include "cpu/middle.h"
#include "device.h"
#include "operator.h"
#include "products.h"
#include "trace.h"

#ifdef TCURLORA_CUDA
#include "cuda/middle.h"
#endif

namespace tcurlora::native {
namespace {

// The kernels for the device of a tensor; cpu/middle.h describes arguments and results.
Tensor middle_forward(const Tensor& h, const Stack& stack) {
  const Stage stage("m = h B^T");
#ifdef TCURLORA_CUDA
  if (on_gpu(h)) return cuda::middle_forward(h, stack);
#endif
  return cpu::middle_forward(h, stack);
}

std::tuple<Tensor, Tensor> middle_backward(
    const Tensor& p, const OptionalTensor& h, const Stack& stack, bool needs_h) {
  const Stage stage("dh = p B, dcore = diag(p^T h)");
#ifdef TCURLORA_CUDA
  if (on_gpu(p)) return cuda::middle_backward(p, h, stack, needs_h);
#endif
  return cpu::middle_backward(p, h, stack, needs_h);
}

// (T, n*columns) -> (T*n, columns), one row per token and slice.
Tensor slices_of(const Tensor& tensor, const Stack& stack) {
  return stack.num_slices == 1 ? tensor : tensor.reshape({-1, stack.out_features()});
}

Tensor hidden_of(const Tensor& x, const Stack& stack) {
  const Stage stage("h = x row^T");
  return product(x, transposed(stack.row));
}

Tensor projected(const Tensor& g_slices, const Stack& stack) {
  const Stage stage("p = g col");
  return product(g_slices, stack.col);
}

// Both orders pass over y three times: the first product writes it, with the bias in its epilogue, and the second reads
// and writes it. A bias that is copied into y beforehand would cost two passes more.
//
// The base is computed as by nn.Linear, and delta is added in place: a zero core gives the base's y bit for bit.
Tensor base_then_adapter(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& m, const Stack& stack) {
  Tensor y;
  {
    const Stage stage("y = x W^T + bias");
    y = product(x, transposed(weight), bias);
  }
  const Stage stage("y += m col^T");
  accumulate(slices_of(y, stack), m, transposed(stack.col));
  return y;
}

// Delta is computed first and the base product accumulates onto it. The base's sums, in float32 inside the product, are
// then rounded once; delta, the smaller part, and the bias are rounded twice. A bias needs a single slice: the product
// with col has a row for each slice, and an epilogue adds the same bias to all rows.
Tensor adapter_then_base(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& m, const Stack& stack) {
  Tensor y;
  {
    const Stage stage("y = bias + m col^T");
    y = product(m, transposed(stack.col), bias).view({x.size(0), weight.size(0)});
  }
  const Stage stage("y += x W^T");
  accumulate(y, x, transposed(weight));
  return y;
}

// On the CPU the base is first always, on a GPU only for a bias of several slices: its sums are rounded twice there.
bool base_is_first(const Tensor& x, const OptionalTensor& bias, const Stack& stack) {
  return !on_gpu(x) || (bias.has_value() && stack.num_slices > 1);
}

// dx in three passes too, on a GPU again with the base accumulated onto the adapter's part.
Tensor input_gradient(const Tensor& g, const Tensor& weight, const Tensor& dh, const Stack& stack) {
  const Stage stage("dx = g W + dh row");
  Tensor dx;
  if (on_gpu(g)) {
    dx = product(dh, stack.row);
    accumulate(dx, g, weight);
  } else {
    dx = product(g, weight);
    accumulate(dx, dh, stack.row);
  }
  return dx;
}

}  // namespace

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Stack& stack) {
  const Tensor x2 = rows_of(x);
  Tensor h = hidden_of(x2, stack);
  const Tensor m = middle_forward(h, stack);
  Tensor y = base_is_first(x, bias, stack) ? base_then_adapter(x2, weight, bias, m, stack)
                                           : adapter_then_base(x2, weight, bias, m, stack);
  if (x.dim() != 2) y = y.view(with_last(x.sizes(), weight.size(0)));
  return {std::move(y), std::move(h)};
}

Gradients backward(
    const Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Tensor& weight, const Stack& stack,
    const Needs& needs) {
  const auto [needs_x, needs_weight, needs_bias, needs_col, needs_core, needs_row] = needs;
  Tensor dx, dweight, dbias, dcol, dcore, drow;
  const Tensor g2 = rows_of(g);
  const auto saved_x = [&] {
    TORCH_CHECK_VALUE(x.has_value(), "x was not saved for this gradient");
    return rows_of(*x);
  };
  if (needs_weight) dweight = at::mm(transposed(g2), saved_x());
  if (needs_bias) dbias = g2.sum(0);
  if (needs_x || needs_col || needs_core || needs_row) {
    const Tensor g_slices = slices_of(g2, stack);
    Tensor p = projected(g_slices, stack);
    OptionalTensor hidden;
    if (needs_col || needs_core) hidden = h.has_value() ? *h : hidden_of(saved_x(), stack);
    if (needs_col) dcol = at::mm(transposed(g_slices), middle_forward(*hidden, stack));
    const auto [dh, du] = middle_backward(p, needs_core ? hidden : std::nullopt, stack, needs_x || needs_row);
    if (needs_core) dcore = du;
    // p has n*c*S elements per token, more than x has for a fused projection: freed before dx is allocated.
    p.reset();
    hidden.reset();
    if (needs_x) {
      dx = input_gradient(g2, weight, dh, stack);
      if (g.dim() != 2) dx = dx.view(with_last(g.sizes(), stack.row.size(1)));
    }
    if (needs_row) drow = at::mm(transposed(dh), saved_x());
  }
  const auto or_empty = [](const Tensor& gradient, const Tensor& like) {
    return gradient.defined() ? gradient : at::empty({0}, like.options());
  };
  return {or_empty(dx, g),   or_empty(dweight, g),           or_empty(dbias, g),
          or_empty(dcol, g), or_empty(dcore, stack.core), or_empty(drow, g)};
}

}  // namespace tcurlora::native
