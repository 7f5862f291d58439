// The adapter that rides on the base product: operators that change a layer's input in place of adding to its output.
//
//   h = x R^T      x' = x,  x'[:, J] += scale * h (diag(gain) U)^T      y = x' W^T + bias
//   d = g W        p = d[:, J]      dU = scale * diag(gain) p^T h      dx = d + scale * (p diag(gain) U) R
//
// x is (T, in), J the c chosen columns, U the slice's (c, r) of the core (S, c, r), R its (r, in) of row (r*S, in).
// Schemas and their meaning: tcurlora_ext/operator/riding.
#pragma once

#include "../operator.h"

namespace tcurlora {

// The arguments that the riding operators share, as parameters and as passed on. In Python: contract.Riding.
#define TCURLORA_RIDING_ADAPTER                                                                               \
  const Tensor &columns, const Tensor &core, const Tensor &row, const Tensor &gain, int64_t slice_index, \
      double scale
#define TCURLORA_RIDING_ADAPTER_NAMES columns, core, row, gain, slice_index, scale

struct Riding {
  const Tensor& columns;  // (c,) int64
  const Tensor& core;     // (S, c, r)
  const Tensor& row;      // (r*S, in)
  const Tensor& gain;     // (c,), in the dtype of core
  int64_t slice_index;
  double scale;

  int64_t c() const { return core.size(1); }
  int64_t r() const { return core.size(2); }
  Tensor own_core() const { return core.size(0) == 1 ? core : core.narrow(0, slice_index, 1); }  // (1, c, r)
  Tensor own_row() const { return core.size(0) == 1 ? row : row.narrow(0, slice_index * r(), r()); }
};

using RideNeeds = std::array<bool, 3>;  // x, core, row

// The two steps that a backend has. `ride_back` turns the gradient of x', in g (T, in), into that of x where it is
// needed, and returns the gradients of core and row, undefined where they are not.
std::tuple<Tensor, Tensor> ride(const Tensor& x, const Riding& adapter, size_t backend);
std::tuple<Tensor, Tensor> ride_back(
    Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Riding& adapter, RideNeeds needs,
    size_t backend);

namespace native {
std::tuple<Tensor, Tensor> ride(const Tensor& x, const Riding& adapter);
std::tuple<Tensor, Tensor> ride_back(
    Tensor& g, const OptionalTensor& x, const OptionalTensor& h, const Riding& adapter, RideNeeds needs);
}  // namespace native

namespace cpu {
// x' (T, in) from x (T, in), whose rows are dense, and h (T, r).
Tensor changed_input(const Tensor& x, const Tensor& h, const Riding& adapter);
// From g (T, in), whose features `columns` are p: dh = scale * p diag(gain) U (T, r), in the dtype of g, where `needs_h`;
// the core's gradient (S, c, r), where h (T, r) is given. What is not asked for is undefined. The sums over tokens are in
// chunks that do not depend on the number of threads.
std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Riding& adapter, bool needs_h);
}  // namespace cpu

#ifdef TCURLORA_CUDA
namespace cuda {
// The same on a GPU.
Tensor changed_input(const Tensor& x, const Tensor& h, const Riding& adapter);
std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Riding& adapter, bool needs_h);
}  // namespace cuda
#endif

}  // namespace tcurlora
