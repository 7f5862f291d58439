// Autograd and autocast of torch.ops.tcurlora.*.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/autocast_mode.h>

#include <array>

#include "choice.h"
#include "operator.h"

namespace tcurlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// The backward operator has no derivative. Without this error a second derivative would silently be zero.
struct Backward : torch::autograd::Function<Backward> {
  static variable_list forward(AutogradContext*, TCURLORA_BACKWARD) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight, dbias, dcol, dcore, drow] = backward_operator().call(TCURLORA_BACKWARD_NAMES);
    return {dx, dweight, dbias, dcol, dcore, drow};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "tcurlora::backward has no derivative: a second derivative is not implemented");
  }
};

// The options that the backward pass needs, saved as one entry of numbers: every entry or string costs 0.1 us or more.
using Slices = std::tuple<int64_t, int64_t, double>;   // first_slice, num_slices, scale
using Options = std::tuple<Slices, int64_t, int64_t>;  // transform and whether there is a bias; backend, 0 for "auto"

// The autograd function of linear (y) and of forward (y and h). Only forward marks an output, h, as not differentiable:
// compiled autograd does not support that in C++.
template <bool returns_h>
struct Forward : torch::autograd::Function<Forward<returns_h>> {
  static variable_list forward(AutogradContext* context, TCURLORA_FORWARD) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h] = forward_operator().call(TCURLORA_FORWARD_NAMES);
    // h has T*r*S elements, x has T*in. Either suffices for the gradients of core and col, so the smaller is saved.
    const bool needs_h = core.requires_grad() || col.requires_grad();
    const bool prefers_x = row.size(0) > row.size(1);
    const bool saves_x = weight.requires_grad() || row.requires_grad() || (needs_h && prefers_x);
    context->save_for_backward(
        {saves_x ? x : Tensor(), needs_h && !prefers_x ? h : Tensor(), weight, col, core, row});
    context->set_materialize_grads(false);
    // The operator has refused unknown backends by now, and the backends the transforms that they do not compute with.
    const size_t folding = Names::index(names().transforms, transform);
    TORCH_CHECK_VALUE(folding < names().transforms.size(), "transform '", transform, "' is not among set_names()'s");
    context->saved_data["options"] = Options(
        {first_slice, num_slices, scale}, static_cast<int64_t>(2 * folding + bias.has_value()),
        static_cast<int64_t>(backend == "auto" ? 0 : 1 + Names::index(names().backends, backend)));
    if constexpr (!returns_h) return {std::move(y)};
    context->mark_non_differentiable({h});
    return {std::move(y), std::move(h)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list result(11);
    if (!gradients[0].defined()) return result;
    const auto saved = context->get_saved_variables();
    const auto [slices, form, place] = context->saved_data["options"].template to<Options>();
    const auto [first_slice, num_slices, scale] = slices;
    const bool has_bias = form % 2 != 0;
    Needs needs;
    // A missing bias is not an input of the graph: the inputs after it have an index smaller by one.
    for (size_t i = 0; i < needs.size(); ++i) {
      needs[i] = (i != 2 || has_bias) && context->needs_input_grad(i > 2 && !has_bias ? i - 1 : i);
    }
    const c10::string_view backend = place == 0 ? c10::string_view("auto") : names().backends[place - 1];
    auto [dx, dweight, dbias, dcol, dcore, drow] = backward_operator().call(
        gradients[0], optional(saved[0]), optional(saved[1]), saved[2], saved[3], saved[4], saved[5], first_slice,
        num_slices, scale, needs, names().transforms[form / 2], backend);
    const std::array<Tensor, 6> asked{dx, dweight, dbias, dcol, dcore, drow};
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) result[i] = asked[i];
    }
    return result;
  }
};

Tensor linear_autograd(TCURLORA_FORWARD) {
  return std::move(Forward<false>::apply(TCURLORA_FORWARD_NAMES)[0]);
}

std::tuple<Tensor, Tensor> forward_autograd(TCURLORA_FORWARD) {
  auto outputs = Forward<true>::apply(TCURLORA_FORWARD_NAMES);
  return {std::move(outputs[0]), std::move(outputs[1])};
}

Gradients backward_autograd(TCURLORA_BACKWARD) {
  const auto d = Backward::apply(TCURLORA_BACKWARD_NAMES);
  return {d[0], d[1], d[2], d[3], d[4], d[5]};
}

// The operators with autocast off: their arguments are already cast, also in a backward pass under autocast.
c10::impl::ExcludeDispatchKeyGuard without_autocast(const Tensor& tensor) {
  return c10::impl::ExcludeDispatchKeyGuard(
      at::autocast::get_autocast_dispatch_key_from_device_type(tensor.device().type()));
}

// Casts as nn.Linear does: floating tensors other than float64 to the autocast dtype. The core keeps its dtype.
Tensor linear_autocast(TCURLORA_FORWARD) {
  const auto device = x.device().type();
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto off = without_autocast(x);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  return linear_operator().call(
      cast(x), cast(weight), bias.has_value() ? OptionalTensor(cast(*bias)) : bias, cast(col), core, cast(row),
      first_slice, num_slices, scale, TCURLORA_OPTION_NAMES);
}

std::tuple<Tensor, Tensor> forward_autocast(TCURLORA_FORWARD) {
  const auto off = without_autocast(x);
  return forward_operator().call(TCURLORA_FORWARD_NAMES);
}

Gradients backward_autocast(TCURLORA_BACKWARD) {
  const auto off = without_autocast(g);
  return backward_operator().call(TCURLORA_BACKWARD_NAMES);
}

TORCH_LIBRARY_IMPL(tcurlora, Autograd, library) {
  library.impl("forward", forward_autograd);
  library.impl("backward", backward_autograd);
}

// Registered per device: the kernel that linear has on every key takes precedence over one on the alias key Autograd.
TORCH_LIBRARY_IMPL(tcurlora, AutogradCPU, library) { library.impl("linear", linear_autograd); }
TORCH_LIBRARY_IMPL(tcurlora, AutogradCUDA, library) { library.impl("linear", linear_autograd); }

void register_autocast(torch::Library& library) {
  library.impl("linear", linear_autocast);
  library.impl("forward", forward_autocast);
  library.impl("backward", backward_autocast);
}

TORCH_LIBRARY_IMPL(tcurlora, AutocastCPU, library) { register_autocast(library); }
TORCH_LIBRARY_IMPL(tcurlora, AutocastCUDA, library) { register_autocast(library); }

}  // namespace
}  // namespace tcurlora
