// Schemas of the riding operators, their checks, and the base's products around the two steps of a backend.
#include "operators.h"

#include <ATen/ops/arange.h>
#include <torch/library.h>

#include <algorithm>

#include "../choice.h"
#include "../messages.h"
#include "../products.h"
#include "../trace.h"

namespace tcurlora {
namespace {

void check_one(const char* name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& x, const Riding& adapter) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == shape, name, " has shape ", shape_text(tensor.sizes()), ", expected ", shape_text(shape),
      " for core ", shape_text(adapter.core.sizes()));
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " is on ", tensor.device(), ", expected ", x.device(), " as x");
}

void check_dtype(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == like.scalar_type(), name, " is ", dtype_text(tensor), ", expected ", dtype_text(like),
      " as ", like_name);
}

// As tcurlora_ext/operator/riding/arguments.py checks; `weight` is null for an opaque base.
void check(const Tensor& x, const Tensor* weight, const OptionalTensor& bias, const Riding& adapter) {
  const auto& [columns, core, row, gain, at, scale] = adapter;
  TORCH_CHECK_VALUE(
      core.dim() == 3 && row.dim() == 2 && columns.dim() == 1 && (weight == nullptr || weight->dim() == 2), "core ",
      shape_text(core.sizes()), ", row ", shape_text(row.sizes()), ", columns ", shape_text(columns.sizes()),
      " and weight ", weight == nullptr ? "None" : shape_text(weight->sizes()), ": expected 3, 2, 1 and 2 dimensions");
  TORCH_CHECK_VALUE(x.is_floating_point(), "x is ", dtype_text(x), ", expected a floating dtype");
  TORCH_CHECK_VALUE(core.is_floating_point(), "core is ", dtype_text(core), ", expected a floating dtype");
  const int64_t in = row.size(1);
  if (x.dim() == 0 || x.size(-1) != in) {
    auto shape = x.sizes().vec();
    shape.resize(std::max<size_t>(shape.size(), 1));
    shape.back() = in;
    check_one("x", x, shape, x, adapter);
  }
  if (weight != nullptr) {
    check_one("weight", *weight, {weight->size(0), in}, x, adapter);
    check_dtype("weight", *weight, "x", x);
    TORCH_CHECK_VALUE(
        !weight->requires_grad(),
        "weight requires a gradient: the riding form is for a frozen weight, whose columns are C");
  }
  if (bias.has_value()) {
    check_one("bias", *bias, {weight->size(0)}, x, adapter);
    check_dtype("bias", *bias, "x", x);
  }
  check_one("columns", columns, {adapter.c()}, x, adapter);
  check_one("core", core, core.sizes(), x, adapter);
  check_one("row", row, {adapter.r() * core.size(0), in}, x, adapter);
  check_dtype("row", row, "x", x);
  check_one("gain", gain, {adapter.c()}, x, adapter);
  check_dtype("gain", gain, "core", core);
  TORCH_CHECK_VALUE(
      at >= 0 && at < core.size(0), "slice ", at, " asked for, the core has 0..", core.size(0) - 1);
}

size_t backend_of(c10::string_view name, const Tensor& rows, const Tensor& core, int64_t weight) {
  const int64_t last = rows.dim() > 0 ? std::max<int64_t>(rows.size(-1), 1) : 1;
  const int64_t width = core.dim() == 3 ? std::max(core.size(1), core.size(2)) : 0;
  return choose(name, rows.device(), rows.scalar_type(), {rows.numel() / last, width, weight});
}

OptionalTensor rows_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tcurlora::rows_of(*tensor)) : std::nullopt;
}

Tensor or_empty(const Tensor& gradient, const Tensor& like) {
  return gradient.defined() ? gradient : at::empty({0}, like.options());
}

std::tuple<Tensor, Tensor> riding_forward(TCURLORA_RIDING) {
  const Riding adapter{TCURLORA_RIDING_ADAPTER_NAMES};
  const size_t chosen = backend_of(backend, x, core, weight.numel());
  check(x, &weight, bias, adapter);
  auto [changed, h] = ride(tcurlora::rows_of(x), adapter, chosen);
  const Stage stage("y = x' W^T + bias");
  Tensor y = product(changed, transposed(weight), bias);
  if (x.dim() != 2) y = y.view(with_last(x.sizes(), weight.size(0)));
  return {std::move(y), std::move(h)};
}

RidingGradients riding_backward(TCURLORA_RIDING_BACKWARD) {
  const auto [needs_x, needs_bias, needs_core, needs_row] = needs;
  const Riding adapter{TCURLORA_RIDING_ADAPTER_NAMES};
  const size_t chosen = backend_of(backend, g, core, weight.numel());
  const Tensor g2 = tcurlora::rows_of(g);
  Tensor dx, dbias, dcore, drow;
  if (needs_bias) dbias = g2.sum(0);
  const RideNeeds rest{needs_x, needs_core, needs_row};
  if (needs_x) {
    {
      const Stage stage("d = g W");
      dx = product(g2, weight);
    }
    std::tie(dcore, drow) = ride_back(dx, rows_of(x), h, adapter, rest, chosen);
    if (g.dim() != 2) dx = dx.view(with_last(g.sizes(), weight.size(1)));
  } else if (needs_core || needs_row) {
    // Only the chosen features of g W are needed, as before a network's first adapted layer.
    Tensor p;
    {
      const Stage stage("p = g W[:, J]");
      p = product(g2, weight.index_select(1, columns));
    }
    const Tensor all = at::arange(adapter.c(), columns.options());
    std::tie(dcore, drow) =
        ride_back(p, rows_of(x), h, {all, core, row, gain, slice_index, scale}, rest, chosen);
  }
  return {or_empty(dx, g), or_empty(dbias, g), or_empty(dcore, core), or_empty(drow, g)};
}

std::tuple<Tensor, Tensor> ride_forward(TCURLORA_RIDE) {
  const Riding adapter{TCURLORA_RIDING_ADAPTER_NAMES};
  const size_t chosen = backend_of(backend, x, core, 0);
  check(x, nullptr, std::nullopt, adapter);
  auto [changed, h] = ride(tcurlora::rows_of(x), adapter, chosen);
  if (x.dim() != 2) changed = changed.view(x.sizes());
  return {std::move(changed), std::move(h)};
}

RideGradients ride_backward(TCURLORA_RIDE_BACKWARD) {
  const Riding adapter{TCURLORA_RIDING_ADAPTER_NAMES};
  const size_t chosen = backend_of(backend, g, core, 0);
  Tensor dx = tcurlora::rows_of(g).clone(at::MemoryFormat::Contiguous);
  const auto [dcore, drow] = ride_back(dx, rows_of(x), h, adapter, needs, chosen);
  if (g.dim() != 2) dx = dx.view(g.sizes());
  return {needs[0] ? dx : at::empty({0}, g.options()), or_empty(dcore, core), or_empty(drow, g)};
}

// A backend in Python registers these two steps (tcurlora_ext/operator/riding/registration.py).
using PythonRide = std::tuple<Tensor, Tensor>(const Tensor&, TCURLORA_RIDING_ADAPTER);
using PythonRideBack = std::tuple<Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, TCURLORA_RIDING_ADAPTER, RideNeeds);

template <typename Type>
c10::TypedOperatorHandle<Type> step_of(size_t backend, const char* step) {
  const std::string name = "tcurlora::" + names().backends[backend] + step;
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Type>();
}

bool is_native(size_t backend) { return names().backends[backend] == kNative; }

Tensor riding(TCURLORA_RIDING) { return std::get<0>(riding_forward_operator().call(TCURLORA_RIDING_NAMES)); }
Tensor ride_alone(TCURLORA_RIDE) { return std::get<0>(ride_forward_operator().call(TCURLORA_RIDE_NAMES)); }

#define ADAPTER "Tensor columns, Tensor core, Tensor row, Tensor gain, int slice_index, float scale"
#define BACKEND "str backend=\"auto\""
#define RIDING "(Tensor x, Tensor weight, Tensor? bias, " ADAPTER ", " BACKEND ")"
#define RIDE "(Tensor x, " ADAPTER ", " BACKEND ")"

TORCH_LIBRARY_FRAGMENT(tcurlora, library) {
  library.def("riding" RIDING " -> Tensor");
  library.def("riding_forward" RIDING " -> (Tensor y, Tensor h)");
  library.def(
      "riding_backward(Tensor g, Tensor? x, Tensor? h, Tensor weight, " ADAPTER ", bool[4] needs, " BACKEND
      ") -> (Tensor dx, Tensor dbias, Tensor dcore, Tensor drow)");
  library.def("ride" RIDE " -> Tensor");
  library.def("ride_forward" RIDE " -> (Tensor changed, Tensor h)");
  library.def(
      "ride_backward(Tensor g, Tensor? x, Tensor? h, " ADAPTER ", bool[3] needs, " BACKEND
      ") -> (Tensor dx, Tensor dcore, Tensor drow)");
}

TORCH_LIBRARY_IMPL(tcurlora, CompositeExplicitAutograd, library) {
  library.impl("riding_forward", riding_forward);
  library.impl("riding_backward", riding_backward);
  library.impl("ride_forward", ride_forward);
  library.impl("ride_backward", ride_backward);
}

TORCH_LIBRARY_IMPL(tcurlora, CompositeImplicitAutograd, library) {
  library.impl("riding", riding);
  library.impl("ride", ride_alone);
}

}  // namespace

std::tuple<Tensor, Tensor> ride(const Tensor& x, const Riding& adapter, size_t backend) {
  const auto& [columns, core, row, gain, slice_index, scale] = adapter;
  if (is_native(backend)) return native::ride(x, adapter);
  return step_of<PythonRide>(backend, "_ride").call(x, TCURLORA_RIDING_ADAPTER_NAMES);
}

std::tuple<Tensor, Tensor> ride_back(
    Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Riding& adapter, RideNeeds needs,
    size_t backend) {
  const auto& [columns, core, row, gain, slice_index, scale] = adapter;
  if (is_native(backend)) return native::ride_back(g, x, h, adapter, needs);
  return step_of<PythonRideBack>(backend, "_ride_back").call(g, x, h, TCURLORA_RIDING_ADAPTER_NAMES, needs);
}

namespace native {
namespace {

// The kernels for the device of a tensor; csrc/riding/riding.h describes arguments and results.
Tensor changed_input(const Tensor& x, const Tensor& h, const Riding& adapter) {
  const Stage stage("x' = x, x'[:, J] += h U^T");
#ifdef TCURLORA_CUDA
  if (on_gpu(x)) return cuda::changed_input(x, h, adapter);
#endif
  return cpu::changed_input(x, h, adapter);
}

std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Riding& adapter, bool needs_h) {
  const Stage stage("dcore = p^T h, dh = p U");
#ifdef TCURLORA_CUDA
  if (on_gpu(g)) return cuda::changed_input_back(g, h, adapter, needs_h);
#endif
  return cpu::changed_input_back(g, h, adapter, needs_h);
}

}  // namespace

std::tuple<Tensor, Tensor> ride(const Tensor& x, const Riding& adapter) {
  Tensor h;
  {
    const Stage stage("h = x row^T");
    h = product(x, transposed(adapter.own_row()));
  }
  Tensor changed = changed_input(x, h, adapter);
  return {std::move(changed), std::move(h)};
}

std::tuple<Tensor, Tensor> ride_back(
    Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Riding& adapter, RideNeeds needs) {
  const auto [needs_x, needs_core, needs_row] = needs;
  TORCH_CHECK_VALUE(!needs_core || h.has_value(), "h was not saved for this gradient");
  TORCH_CHECK_VALUE(!needs_row || x.has_value(), "x was not saved for this gradient");
  const auto [dh, dcore] = changed_input_back(g, needs_core ? h : std::nullopt, adapter, needs_x || needs_row);
  Tensor drow;
  if (needs_row) {
    const Tensor own = at::mm(transposed(dh), *x);
    drow = adapter.core.size(0) == 1 ? own : at::zeros_like(adapter.row, at::MemoryFormat::Contiguous);
    if (adapter.core.size(0) > 1) drow.narrow(0, adapter.slice_index * adapter.r(), adapter.r()).copy_(own);
  }
  if (needs_x) {
    const Stage stage("dx = d + dh row");
    accumulate(g, dh, adapter.own_row());
  }
  return {dcore, drow};
}

}  // namespace native
}  // namespace tcurlora
