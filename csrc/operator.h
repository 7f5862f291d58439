// The operators torch.ops.tcurlora.*: their schema as C++ types, and the functions that each device provides.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "middle.h"

namespace tcurlora {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Needs = std::array<bool, 6>;  // x, weight, bias, col, core, row
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The arguments that the operators share, as parameters and as passed on. The same list in Python is in
// tcurlora_ext/maths/contract.py.
#define TCURLORA_FACTORS                                                                               \
  const Tensor &col, const Tensor &core, const Tensor &row, int64_t first_slice, int64_t num_slices, \
      double scale
#define TCURLORA_FACTOR_NAMES col, core, row, first_slice, num_slices, scale
#define TCURLORA_OPTIONS c10::string_view transform, c10::string_view backend
#define TCURLORA_OPTION_NAMES transform, backend
// The arguments of linear and forward.
#define TCURLORA_FORWARD \
  const Tensor &x, const Tensor &weight, const OptionalTensor &bias, TCURLORA_FACTORS, TCURLORA_OPTIONS
#define TCURLORA_FORWARD_NAMES x, weight, bias, TCURLORA_FACTOR_NAMES, TCURLORA_OPTION_NAMES
// The arguments of backward.
#define TCURLORA_BACKWARD                                                                                       \
  const Tensor &g, const OptionalTensor &x, const OptionalTensor &h, const Tensor &weight, TCURLORA_FACTORS, \
      Needs needs, TCURLORA_OPTIONS
#define TCURLORA_BACKWARD_NAMES g, x, h, weight, TCURLORA_FACTOR_NAMES, needs, TCURLORA_OPTION_NAMES

using LinearType = Tensor(TCURLORA_FORWARD);
using ForwardType = std::tuple<Tensor, Tensor>(TCURLORA_FORWARD);
using BackwardType = Gradients(TCURLORA_BACKWARD);

// The registered operators, through the dispatcher.
const c10::TypedOperatorHandle<LinearType>& linear_operator();
const c10::TypedOperatorHandle<ForwardType>& forward_operator();
const c10::TypedOperatorHandle<BackwardType>& backward_operator();

// The factors, the core, and which slices of the stack are, stacked by rows, the layer's weight.
struct Stack {
  const Tensor& col;   // (out, c*S)
  const Tensor& core;  // (S, c, r)
  const Tensor& row;   // (r*S, in)
  int64_t first_slice;
  int64_t num_slices;
  double scale;
  Transform transform;

  int64_t slices() const { return core.size(0); }
  int64_t c() const { return core.size(1); }
  int64_t r() const { return core.size(2); }
  int64_t out_features() const { return col.size(0); }
};

Transform parse_transform(std::string_view name);

// Throws where shapes, dtypes, devices or slices do not fit together; the message names the tensor.
void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Stack& stack);

namespace native {
// Returns y (..., n*out) and h (T, r*S).
std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Stack& stack);
// Gradients of (x, weight, bias, col, core, row); an empty tensor for each that `needs` does not ask for.
Gradients backward(
    const Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Tensor& weight, const Stack& stack,
    const Needs& needs);
}  // namespace native

}  // namespace tcurlora
