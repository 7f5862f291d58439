// CPU kernels of the riding form for a batch of many adapters; csrc/riding/bank.cpp has the operators around them.
#pragma once

#include "../operator.h"

namespace tcurlora {

// What the tokens of a batch ride on: the chosen columns J, and the core of each adapter.
struct Cores {
  const Tensor& columns;  // (c,) int64
  const Tensor& cores;    // (D, c, r), float64 for x in float64 and float32 for all others
  const Tensor& gain;     // (c,), in the dtype of cores
  double scale;

  int64_t number() const { return cores.size(0); }
  int64_t c() const { return cores.size(1); }
  int64_t r() const { return cores.size(2); }
};

namespace cpu {

// x' (T, in) from x (T, in), whose rows are dense, h (T, r) and the adapter of each token, owners (T,) int64, -1 for
// the base, whose rows are copied as they are.
Tensor changed_input(const Tensor& x, const Tensor& h, const Cores& adapters, const Tensor& owners);

// From g (T, in), whose features `columns` are p: dh (T, r) in the dtype of g, where `needs_h`; the gradient of the
// cores (D, c, r), where h (T, r) is given. What is not asked for is undefined.
//
// order: the tokens that have an adapter, those of one adapter after the other, int64.
// ends: where in `order` the tokens of each adapter end, (D,) int64.
//
// The tokens of an adapter are summed in their order, in pieces that do not depend on the number of threads.
std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Cores& adapters, const Tensor& order, const Tensor& ends,
    bool needs_h);

}  // namespace cpu
}  // namespace tcurlora
