// Autograd and autocast of the riding operators; csrc/autograd.cpp explains what it has in common with this.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/autocast_mode.h>

#include "../choice.h"
#include "operators.h"

namespace tcurlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// slice_index, scale; whether there is a bias; backend, 0 for "auto".
using Options = std::tuple<int64_t, double, bool, int64_t>;

int64_t place_of(c10::string_view backend) {
  return backend == "auto" ? 0 : 1 + static_cast<int64_t>(Names::index(names().backends, backend));
}
c10::string_view backend_at(int64_t place) {
  return place == 0 ? c10::string_view("auto") : names().backends[place - 1];
}

// Saves h for the core's gradient, and x only for the row factor's.
void save(
    AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& h, bool has_bias,
    TCURLORA_RIDING_ADAPTER, c10::string_view backend) {
  context->save_for_backward(
      {row.requires_grad() ? x : Tensor(), core.requires_grad() ? h : Tensor(), weight, columns, core, row, gain});
  context->set_materialize_grads(false);
  context->saved_data["options"] = Options(slice_index, scale, has_bias, place_of(backend));
}

// The autograd function of riding (y) and of riding_forward (y and h, which is not differentiable).
template <bool returns_h>
struct RidingFunction : torch::autograd::Function<RidingFunction<returns_h>> {
  static variable_list forward(AutogradContext* context, TCURLORA_RIDING) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h] = riding_forward_operator().call(TCURLORA_RIDING_NAMES);
    save(context, x, weight, h, bias.has_value(), TCURLORA_RIDING_ADAPTER_NAMES, backend);
    if constexpr (!returns_h) return {std::move(y)};
    context->mark_non_differentiable({h});
    return {std::move(y), std::move(h)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list result(10);
    if (!gradients[0].defined()) return result;
    const auto saved = context->get_saved_variables();
    const auto [slice_index, scale, has_bias, place] = context->saved_data["options"].template to<Options>();
    // A missing bias is not an input of the graph: the inputs after it have an index smaller by one.
    const int64_t shift = has_bias ? 0 : 1;
    const RidingNeeds needs{
        context->needs_input_grad(0), has_bias && context->needs_input_grad(2), context->needs_input_grad(4 - shift),
        context->needs_input_grad(5 - shift)};
    auto [dx, dbias, dcore, drow] = riding_backward_operator().call(
        gradients[0], optional(saved[0]), optional(saved[1]), saved[2], saved[3], saved[4], saved[5], saved[6],
        slice_index, scale, needs, backend_at(place));
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[2] = dbias;
    if (needs[2]) result[4] = dcore;
    if (needs[3]) result[5] = drow;
    return result;
  }
};

template <bool returns_h>
struct RideFunction : torch::autograd::Function<RideFunction<returns_h>> {
  static variable_list forward(AutogradContext* context, TCURLORA_RIDE) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [changed, h] = ride_forward_operator().call(TCURLORA_RIDE_NAMES);
    save(context, x, Tensor(), h, false, TCURLORA_RIDING_ADAPTER_NAMES, backend);
    if constexpr (!returns_h) return {std::move(changed)};
    context->mark_non_differentiable({h});
    return {std::move(changed), std::move(h)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list result(8);
    if (!gradients[0].defined()) return result;
    const auto saved = context->get_saved_variables();
    const auto [slice_index, scale, has_bias, place] = context->saved_data["options"].template to<Options>();
    const RideNeeds needs{
        context->needs_input_grad(0), context->needs_input_grad(2), context->needs_input_grad(3)};
    auto [dx, dcore, drow] = ride_backward_operator().call(
        gradients[0], optional(saved[0]), optional(saved[1]), saved[3], saved[4], saved[5], saved[6], slice_index,
        scale, needs, backend_at(place));
    if (needs[0]) result[0] = dx;
    if (needs[1]) result[2] = dcore;
    if (needs[2]) result[3] = drow;
    return result;
  }
};

// The backward operators have no derivative. Without these errors a second derivative would silently be zero.
struct RidingBackwardFunction : torch::autograd::Function<RidingBackwardFunction> {
  static variable_list forward(AutogradContext*, TCURLORA_RIDING_BACKWARD) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dbias, dcore, drow] = riding_backward_operator().call(TCURLORA_RIDING_BACKWARD_NAMES);
    return {dx, dbias, dcore, drow};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "tcurlora::riding_backward has no derivative: a second derivative is not implemented");
  }
};

struct RideBackwardFunction : torch::autograd::Function<RideBackwardFunction> {
  static variable_list forward(AutogradContext*, TCURLORA_RIDE_BACKWARD) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dcore, drow] = ride_backward_operator().call(TCURLORA_RIDE_BACKWARD_NAMES);
    return {dx, dcore, drow};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "tcurlora::ride_backward has no derivative: a second derivative is not implemented");
  }
};

Tensor riding_autograd(TCURLORA_RIDING) {
  return std::move(RidingFunction<false>::apply(TCURLORA_RIDING_NAMES)[0]);
}
std::tuple<Tensor, Tensor> riding_forward_autograd(TCURLORA_RIDING) {
  auto outputs = RidingFunction<true>::apply(TCURLORA_RIDING_NAMES);
  return {std::move(outputs[0]), std::move(outputs[1])};
}
RidingGradients riding_backward_autograd(TCURLORA_RIDING_BACKWARD) {
  const auto d = RidingBackwardFunction::apply(TCURLORA_RIDING_BACKWARD_NAMES);
  return {d[0], d[1], d[2], d[3]};
}
Tensor ride_autograd(TCURLORA_RIDE) { return std::move(RideFunction<false>::apply(TCURLORA_RIDE_NAMES)[0]); }
std::tuple<Tensor, Tensor> ride_forward_autograd(TCURLORA_RIDE) {
  auto outputs = RideFunction<true>::apply(TCURLORA_RIDE_NAMES);
  return {std::move(outputs[0]), std::move(outputs[1])};
}
RideGradients ride_backward_autograd(TCURLORA_RIDE_BACKWARD) {
  const auto d = RideBackwardFunction::apply(TCURLORA_RIDE_BACKWARD_NAMES);
  return {d[0], d[1], d[2]};
}

c10::impl::ExcludeDispatchKeyGuard without_autocast(const Tensor& tensor) {
  return c10::impl::ExcludeDispatchKeyGuard(
      at::autocast::get_autocast_dispatch_key_from_device_type(tensor.device().type()));
}

// Casts as nn.Linear does: floating tensors other than float64 to the autocast dtype. Core and gain keep theirs.
Tensor riding_autocast(TCURLORA_RIDING) {
  const auto device = x.device().type();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto off = without_autocast(x);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  return riding_operator().call(
      cast(x), cast(weight), bias.has_value() ? OptionalTensor(cast(*bias)) : bias, columns, core, cast(row), gain,
      slice_index, scale, backend);
}
Tensor ride_autocast(TCURLORA_RIDE) {
  const auto device = x.device().type();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto off = without_autocast(x);
  return ride_operator().call(
      at::autocast::cached_cast(dtype, x, device), columns, core, at::autocast::cached_cast(dtype, row, device), gain,
      slice_index, scale, backend);
}
// The others with autocast off: their arguments are already cast, also in a backward pass under autocast.
std::tuple<Tensor, Tensor> riding_forward_autocast(TCURLORA_RIDING) {
  const auto off = without_autocast(x);
  return riding_forward_operator().call(TCURLORA_RIDING_NAMES);
}
RidingGradients riding_backward_autocast(TCURLORA_RIDING_BACKWARD) {
  const auto off = without_autocast(g);
  return riding_backward_operator().call(TCURLORA_RIDING_BACKWARD_NAMES);
}
std::tuple<Tensor, Tensor> ride_forward_autocast(TCURLORA_RIDE) {
  const auto off = without_autocast(x);
  return ride_forward_operator().call(TCURLORA_RIDE_NAMES);
}
RideGradients ride_backward_autocast(TCURLORA_RIDE_BACKWARD) {
  const auto off = without_autocast(g);
  return ride_backward_operator().call(TCURLORA_RIDE_BACKWARD_NAMES);
}

TORCH_LIBRARY_IMPL(tcurlora, Autograd, library) {
  library.impl("riding_forward", riding_forward_autograd);
  library.impl("riding_backward", riding_backward_autograd);
  library.impl("ride_forward", ride_forward_autograd);
  library.impl("ride_backward", ride_backward_autograd);
}

// Registered per device: the kernel that they have on every key takes precedence over one on the alias key Autograd.
void register_autograd(torch::Library& library) {
  library.impl("riding", riding_autograd);
  library.impl("ride", ride_autograd);
}
TORCH_LIBRARY_IMPL(tcurlora, AutogradCPU, library) { register_autograd(library); }
TORCH_LIBRARY_IMPL(tcurlora, AutogradCUDA, library) { register_autograd(library); }

void register_autocast(torch::Library& library) {
  library.impl("riding", riding_autocast);
  library.impl("riding_forward", riding_forward_autocast);
  library.impl("riding_backward", riding_backward_autocast);
  library.impl("ride", ride_autocast);
  library.impl("ride_forward", ride_forward_autocast);
  library.impl("ride_backward", ride_backward_autocast);
}
TORCH_LIBRARY_IMPL(tcurlora, AutocastCPU, library) { register_autocast(library); }
TORCH_LIBRARY_IMPL(tcurlora, AutocastCUDA, library) { register_autocast(library); }

}  // namespace
}  // namespace tcurlora
