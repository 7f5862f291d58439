// Schemas of torch.ops.tcurlora.* and the choice of an implementation by device and `backend`.
#include "choice.h"
#include "messages.h"
#include "operator.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/ScalarType.h>
#include <c10/util/DimVector.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

namespace tcurlora {

Transform parse_transform(std::string_view name) {
  if (name == "dft") return Transform::dft;
  TORCH_CHECK_VALUE(name == "dct", "transform '", name, "' has no middle product, expected 'dft' or 'dct'");
  return Transform::dct;
}

namespace {

void check_one(
    const char* name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& x, const Stack& stack, bool same_dtype) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == shape, name, " has shape ", shape_text(tensor.sizes()), ", expected ", shape_text(shape),
      " for core ", shape_text(stack.core.sizes()), ", ", stack.num_slices, " slice(s) of ", stack.out_features(), " x ",
      stack.row.size(1));
  TORCH_CHECK_VALUE(
      !same_dtype || tensor.scalar_type() == x.scalar_type(), name, " is ", dtype_text(tensor), ", expected ",
      dtype_text(x), " as x");
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " is on ", tensor.device(), ", expected ", x.device(), " as x");
}

}  // namespace

const c10::TypedOperatorHandle<LinearType>& linear_operator() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("tcurlora::linear", "").typed<LinearType>();
  return op;
}

const c10::TypedOperatorHandle<ForwardType>& forward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("tcurlora::forward", "").typed<ForwardType>();
  return op;
}

const c10::TypedOperatorHandle<BackwardType>& backward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("tcurlora::backward", "").typed<BackwardType>();
  return op;
}

void check(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Stack& stack) {
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && stack.col.dim() == 2 && stack.row.dim() == 2 && stack.core.dim() == 3, "weight ",
      shape_text(weight.sizes()), ", col ", shape_text(stack.col.sizes()), ", row ", shape_text(stack.row.sizes()),
      " and core ", shape_text(stack.core.sizes()), ": expected two dimensions each and three for the core");
  TORCH_CHECK_VALUE(x.is_floating_point(), "x is ", dtype_text(x), ", expected a floating dtype");
  TORCH_CHECK_VALUE(
      stack.core.is_floating_point(), "core is ", dtype_text(stack.core), ", expected a floating dtype");
  const int64_t in = stack.row.size(1), out = stack.out_features(), n = stack.num_slices, slices = stack.slices();
  if (x.dim() == 0 || x.size(-1) != in) {
    c10::DimVector shape(x.sizes());
    shape.resize(std::max<size_t>(shape.size(), 1));
    shape.back() = in;
    check_one("x", x, shape, x, stack, true);
  }
  check_one("weight", weight, {n * out, in}, x, stack, true);
  if (bias.has_value()) check_one("bias", *bias, {n * out}, x, stack, true);
  check_one("col", stack.col, {out, stack.c() * slices}, x, stack, true);
  check_one("row", stack.row, {stack.r() * slices, in}, x, stack, true);
  check_one("core", stack.core, stack.core.sizes(), x, stack, false);
  TORCH_CHECK_VALUE(
      n >= 1 && stack.first_slice >= 0 && stack.first_slice + n <= slices, "slices ", stack.first_slice, "..",
      stack.first_slice + n - 1, " asked for, the core has 0..", slices - 1);
}

namespace {

using PythonForward = std::tuple<Tensor, Tensor>(
    const Tensor&, const Tensor&, const OptionalTensor&, TCURLORA_FACTORS, c10::string_view transform);
using PythonBackward = Gradients(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, TCURLORA_FACTORS, Needs,
    c10::string_view transform);

// Python defines and registers these for its backends (tcurlora_ext/operator/registration.py): the folded form in PyTorch
// operations, on every device, and the Triton kernels.
struct PythonImplementation {
  c10::TypedOperatorHandle<PythonForward> forward;
  c10::TypedOperatorHandle<PythonBackward> backward;

  explicit PythonImplementation(const std::string& name)
      : forward(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(("tcurlora::" + name + "_forward").c_str(), "")
                    .typed<PythonForward>()),
        backward(c10::Dispatcher::singleton()
                     .findSchemaOrThrow(("tcurlora::" + name + "_backward").c_str(), "")
                     .typed<PythonBackward>()) {}
};

// By the index of the backend's name. Looked up once; two threads that do so at the same time find the same operators.
const PythonImplementation& in_python(size_t backend) {
  static std::mutex guard;
  static std::unordered_map<size_t, PythonImplementation> known;
  const std::lock_guard<std::mutex> held(guard);
  auto found = known.find(backend);
  if (found == known.end()) found = known.emplace(backend, PythonImplementation(names().backends[backend])).first;
  return found->second;
}

size_t backend_of(c10::string_view name, const Tensor& rows, const Tensor& weight, const Tensor& core) {
  const int64_t last = rows.dim() > 0 ? std::max<int64_t>(rows.size(-1), 1) : 1;
  const int64_t width = core.dim() == 3 ? core.size(0) * std::max(core.size(1), core.size(2)) : 0;
  return choose(name, rows.device(), rows.scalar_type(), {rows.numel() / last, width, weight.numel()});
}

bool is_native(size_t backend) { return names().backends[backend] == kNative; }

std::tuple<Tensor, Tensor> forward(TCURLORA_FORWARD) {
  const size_t chosen = backend_of(backend, x, weight, core);
  if (!is_native(chosen)) return in_python(chosen).forward.call(x, weight, bias, TCURLORA_FACTOR_NAMES, transform);
  const Stack stack{TCURLORA_FACTOR_NAMES, parse_transform(transform)};
  check(x, weight, bias, stack);
  return native::forward(x, weight, bias, stack);
}

Gradients backward(TCURLORA_BACKWARD) {
  const size_t chosen = backend_of(backend, g, weight, core);
  if (!is_native(chosen)) {
    return in_python(chosen).backward.call(g, x, h, weight, TCURLORA_FACTOR_NAMES, needs, transform);
  }
  const Stack stack{TCURLORA_FACTOR_NAMES, parse_transform(transform)};
  return native::backward(g, x, h, weight, stack, needs);
}

Tensor linear(TCURLORA_FORWARD) { return std::get<0>(forward_operator().call(TCURLORA_FORWARD_NAMES)); }

#define FACTORS "Tensor col, Tensor core, Tensor row, int first_slice, int num_slices, float scale"
#define OPTIONS "str transform=\"dft\", str backend=\"auto\""
#define GRADIENTS "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dcol, Tensor dcore, Tensor drow)"

TORCH_LIBRARY(tcurlora, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", " OPTIONS ") -> Tensor");
  library.def("forward(Tensor x, Tensor weight, Tensor? bias, " FACTORS ", " OPTIONS ") -> (Tensor y, Tensor h)");
  library.def(
      "backward(Tensor g, Tensor? x, Tensor? h, Tensor weight, " FACTORS ", bool[6] needs, " OPTIONS ") -> " GRADIENTS);
}

TORCH_LIBRARY_IMPL(tcurlora, CompositeExplicitAutograd, library) {
  library.impl("forward", forward);
  library.impl("backward", backward);
}

TORCH_LIBRARY_IMPL(tcurlora, CompositeImplicitAutograd, library) { library.impl("linear", linear); }

}  // namespace
}  // namespace tcurlora
