// Operators of a batch of many adapters, for the CPU; their autograd, except that of `gathered`, is in Python
// (tcurlora_ext/operator/bank), which has PyTorch operations for other devices.
#include "../cpu/bank.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../messages.h"
#include "../products.h"
#include "../trace.h"

namespace tcurlora {
namespace {

void check_one(const char* name, const Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == shape, name, " has shape ", shape_text(tensor.sizes()), ", expected ", shape_text(shape));
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == dtype, name, " is ", dtype_text(tensor), ", expected torch.",
      c10::getDtypeNames(dtype).first);
}

void check(const char* name, const Tensor& rows, const Cores& adapters) {
  TORCH_CHECK_VALUE(
      rows.dim() == 2 && rows.is_floating_point(), name, " is ", dtype_text(rows), " ", shape_text(rows.sizes()),
      ", expected a floating dtype and 2 dimensions");
  TORCH_CHECK_VALUE(
      adapters.cores.dim() == 3, "cores have shape ", shape_text(adapters.cores.sizes()), ", expected 3 dimensions");
  const auto wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_one("cores", adapters.cores, adapters.cores.sizes(), wide);
  check_one("columns", adapters.columns, {adapters.c()}, at::kLong);
  check_one("gain", adapters.gain, {adapters.c()}, wide);
}

std::tuple<Tensor, Tensor> ride_many(
    const Tensor& x, const Tensor& row, const Tensor& cores, const Tensor& columns, const Tensor& gain, double scale,
    const Tensor& owners) {
  const Cores adapters{columns, cores, gain, scale};
  check("x", x, adapters);
  check_one("row", row, {adapters.r(), x.size(1)}, x.scalar_type());
  check_one("owners", owners, {x.size(0)}, at::kLong);
  Tensor h;
  {
    const Stage stage("h = x row^T");
    h = product(x, transposed(row));
  }
  const Stage stage("x' = x, x'[:, J] += h U^T");
  Tensor changed = cpu::changed_input(x, h, adapters, owners);
  return {std::move(changed), std::move(h)};
}

std::tuple<Tensor, Tensor> ride_many_backward(
    const Tensor& g, const OptionalTensor& h, const Tensor& cores, const Tensor& columns, const Tensor& gain,
    double scale, const Tensor& order, const Tensor& ends, bool needs_h) {
  const Cores adapters{columns, cores, gain, scale};
  check("g", g, adapters);
  if (h.has_value()) check_one("h", *h, {g.size(0), adapters.r()}, g.scalar_type());
  check_one("order", order, {order.numel()}, at::kLong);
  check_one("ends", ends, {adapters.number()}, at::kLong);
  const Stage stage("dcore = p^T h, dh = p U");
  const auto [dh, dcores] = cpu::changed_input_back(g, h, adapters, order, ends, needs_h);
  return {needs_h ? dh : at::empty({0}, g.options()), h.has_value() ? dcores : at::empty({0}, cores.options())};
}

// The whole layer of one slice, for inference: layers of a few tokens feel every call from Python.
Tensor riding_many(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& columns, const Tensor& cores,
    const Tensor& row, const Tensor& gain, int64_t slice_index, double scale, const Tensor& owners) {
  TORCH_CHECK_VALUE(
      cores.dim() == 4 && row.dim() == 2, "cores ", shape_text(cores.sizes()), " and row ", shape_text(row.sizes()),
      ": expected 4 and 2 dimensions");
  const int64_t r = cores.size(3), slices = row.size(0) / std::max<int64_t>(r, 1);
  TORCH_CHECK_VALUE(
      slice_index >= 0 && slice_index < slices && (cores.size(1) == 1 || cores.size(1) == slices), "slice ",
      slice_index, " asked for, row has ", slices, " and cores have ", cores.size(1));
  const Tensor own_cores = cores.select(1, cores.size(1) == 1 ? 0 : slice_index);
  const Tensor own_row = slices == 1 ? row : row.narrow(0, slice_index * r, r);
  const auto [changed, h] = ride_many(rows_of(x), own_row, own_cores, columns, gain, scale, owners);
  const Stage stage("y = x' W^T + bias");
  const Tensor y = product(changed, transposed(weight), bias);
  return x.dim() == 2 ? y : y.view(with_last(x.sizes(), weight.size(0)));
}

// Cores (D, ...) that were copied from parameters: gradients go to the parameters. It is for thousands of them, for
// which a function of autograd in Python takes as long as a layer.
struct GatheredFunction : torch::autograd::Function<GatheredFunction> {
  static Tensor forward(
      torch::autograd::AutogradContext* context, const Tensor& cores, at::IntArrayRef positions,
      at::TensorList parameters) {
    context->saved_data["positions"] = positions.vec();
    return cores.alias();
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& gradients) {
    const auto positions = context->saved_data["positions"].toIntVector();
    torch::autograd::variable_list result(2 + positions.size());
    if (!gradients[0].defined()) return result;
    // unbind() without its calls of the dispatcher, which take half of the time.
    const Tensor& all = gradients[0];
    const auto sizes = all.sizes().slice(1), strides = all.strides().slice(1);
    for (size_t i = 0; i < positions.size(); ++i) {
      const int64_t offset = all.storage_offset() + positions[i] * all.stride(0);
      result[2 + i] = at::native::as_strided_tensorimpl(all, sizes, strides, offset);
    }
    return result;
  }
};

Tensor gathered(const Tensor& cores, at::IntArrayRef positions, at::TensorList parameters) {
  for (const int64_t position : positions) {
    TORCH_CHECK_INDEX(
        position >= 0 && position < cores.size(0), "position ", position, " is out of range: there are ", cores.size(0),
        " cores");
  }
  TORCH_CHECK_VALUE(
      positions.size() == parameters.size(), "gathered has ", positions.size(), " positions for ", parameters.size(),
      " parameters");
  return GatheredFunction::apply(cores, positions, parameters);
}

TORCH_LIBRARY_FRAGMENT(tcurlora, library) {
  library.def(
      "ride_many(Tensor x, Tensor row, Tensor cores, Tensor columns, Tensor gain, float scale, Tensor owners) -> "
      "(Tensor changed, Tensor h)");
  library.def(
      "ride_many_backward(Tensor g, Tensor? h, Tensor cores, Tensor columns, Tensor gain, float scale, Tensor order, "
      "Tensor ends, bool needs_h) -> (Tensor dh, Tensor dcores)");
  library.def(
      "riding_many(Tensor x, Tensor weight, Tensor? bias, Tensor columns, Tensor cores, Tensor row, Tensor gain, "
      "int slice_index, float scale, Tensor owners) -> Tensor");
  library.def("gathered(Tensor(a) cores, int[] positions, Tensor[] parameters) -> Tensor(a)");
}

TORCH_LIBRARY_IMPL(tcurlora, CPU, library) {
  library.impl("ride_many", ride_many);
  library.impl("ride_many_backward", ride_many_backward);
  library.impl("riding_many", riding_many);
}

TORCH_LIBRARY_IMPL(tcurlora, CompositeImplicitAutograd, library) { library.impl("gathered", gathered); }

}  // namespace
}  // namespace tcurlora
