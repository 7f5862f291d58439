// What the riding form's kernels have to compute, in double:
//
//   x' = x, x'[:, J] += scale * h (diag(gain) U)^T      dh = scale * p diag(gain) U      dU = scale * diag(gain) p^T h
//
// with p = g[:, J]. Columns that x does not have are left out.
#pragma once

#include <cstdint>
#include <vector>

#include "definition.h"

namespace tcurlora::cuda::definition {

struct Riding {
  RidingSizes sizes;
  std::vector<int64_t> columns;
  Numbers gain;
  Numbers core;  // (c, r)

  Numbers changed(const Numbers& x, const Numbers& h) const {
    Numbers result(sizes.tokens * sizes.features);
    for (int64_t t = 0; t < sizes.tokens; ++t) {
      for (int64_t i = 0; i < sizes.features; ++i) result[t * sizes.features + i] = x[t * sizes.step + i];
    }
    for_each([&](int64_t t, int64_t feature, int64_t j, int64_t k) {
      result[t * sizes.features + feature] += sizes.scale * gain[j] * core[j * sizes.r + k] * h[t * sizes.r + k];
    });
    return result;
  }

  Numbers hidden_gradient(const Numbers& g) const {
    Numbers dh(sizes.tokens * sizes.r, 0.0);
    for_each([&](int64_t t, int64_t feature, int64_t j, int64_t k) {
      dh[t * sizes.r + k] += sizes.scale * gain[j] * core[j * sizes.r + k] * g[t * sizes.step + feature];
    });
    return dh;
  }

  Numbers core_gradient(const Numbers& g, const Numbers& h) const {
    Numbers du(core.size(), 0.0);
    for_each([&](int64_t t, int64_t feature, int64_t j, int64_t k) {
      du[j * sizes.r + k] += sizes.scale * gain[j] * g[t * sizes.step + feature] * h[t * sizes.r + k];
    });
    return du;
  }

 private:
  // Calls visit(token, feature, row j and column k of the core) for all of them.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (int64_t t = 0; t < sizes.tokens; ++t) {
      for (int64_t j = 0; j < sizes.c; ++j) {
        if (columns[j] < 0 || columns[j] >= sizes.features) continue;
        for (int64_t k = 0; k < sizes.r; ++k) visit(t, columns[j], j, k);
      }
    }
  }
};

}  // namespace tcurlora::cuda::definition
