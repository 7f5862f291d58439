// CPU kernels of the riding form: x copied and changed in one pass, and the small products of the backward pass.
#include "../riding/riding.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_cpu_dispatch.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "targets.h"

namespace tcurlora::cpu {
namespace {

// Tokens per task of a thread, and at most this many chunks for the sums of the core's gradient.
constexpr int64_t kTokens = 64, kChunks = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t number) { return ceil_div(number, kLanes) * kLanes; }

// scale * diag(gain) U in the type of the sums, as rows of whole vectors with zeros at their ends.
template <typename acc>
struct Mixing {
  int64_t c, r;
  const int64_t* columns;
  std::vector<Lanes<acc>> by_column;  // row k of r: the c entries
  std::vector<Lanes<acc>> by_row;     // row j of c: the r entries

  Mixing(const Riding& adapter, const Tensor& columns_, int64_t features, bool transposed)
      : c(adapter.c()), r(adapter.r()), columns(columns_.const_data_ptr<int64_t>()) {
    for (int64_t j = 0; j < c; ++j) {
      TORCH_CHECK_INDEX(
          columns[j] >= 0 && columns[j] < features, "column ", columns[j], " is out of range: x has ", features,
          " features");
    }
    const Tensor core = adapter.own_core().contiguous(), gain = adapter.gain.contiguous();
    auto& into = transposed ? by_column : by_row;
    const int64_t pitch = padded(transposed ? c : r);
    into.resize((transposed ? r : c) * pitch / kLanes);
    acc* to = reinterpret_cast<acc*>(into.data());
    std::fill_n(to, into.size() * kLanes, acc(0));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, core.scalar_type(), "tcurlora_core", [&] {
      const scalar_t *u = core.const_data_ptr<scalar_t>(), *g = gain.const_data_ptr<scalar_t>();
      for (int64_t j = 0; j < c; ++j) {
        const double factor = adapter.scale * static_cast<double>(g[j]);
        for (int64_t k = 0; k < r; ++k) {
          to[transposed ? k * pitch + j : j * pitch + k] =
              static_cast<acc>(factor * static_cast<double>(u[j * r + k]));
        }
      }
    });
  }
};

template <typename scalar>
struct Change {
  using acc = acc_t<scalar>;
  const Mixing<acc>& mixing;
  int64_t features, step;  // elements of a row of x, and from one row to the next
  const scalar* x;
  const scalar* h;  // (T, r)
  scalar* changed;  // (T, features)
};

template <typename scalar>
TCURLORA_INLINE void change_tokens(const Change<scalar>& call, int64_t begin, int64_t end) {
  using acc = acc_t<scalar>;
  const auto& mixing = call.mixing;
  const int64_t vectors = padded(mixing.c) / kLanes;
  for (int64_t t = begin; t < end; ++t) {
    scalar* to = call.changed + t * call.features;
    std::memcpy(to, call.x + t * call.step, call.features * sizeof(scalar));
    const scalar* h = call.h + t * mixing.r;
    for (int64_t v = 0; v < vectors; ++v) {
      Vector<acc> sum = {};
      for (int64_t k = 0; k < mixing.r; ++k) {
        sum += static_cast<acc>(h[k]) * mixing.by_column[k * vectors + v].lanes;
      }
      acc change[kLanes];
      std::memcpy(change, &sum, sizeof(sum));
      const int64_t first = v * kLanes, count = std::min(mixing.c - first, kLanes);
      for (int64_t i = 0; i < count; ++i) {
        scalar& entry = to[mixing.columns[first + i]];
        entry = static_cast<scalar>(static_cast<acc>(entry) + change[i]);
      }
    }
  }
}

template <typename scalar>
struct ChangeBack {
  using acc = acc_t<scalar>;
  const Mixing<acc>& mixing;
  int64_t tokens, features, per_chunk;
  const scalar* g;  // (T, features)
  const scalar* h;  // (T, r), null where the core's gradient is not asked for
  scalar* dh;       // (T, r), null where it is not asked for
  Lanes<acc>* sums;  // (chunks, c, padded r)
};

// The chunks of tokens from `begin` to `end`.
template <typename scalar>
TCURLORA_INLINE void change_back_chunks(const ChangeBack<scalar>& call, int64_t begin, int64_t end) {
  using acc = acc_t<scalar>;
  const auto& mixing = call.mixing;
  const int64_t c = mixing.c, r = mixing.r, vectors = padded(r) / kLanes;
  std::vector<Lanes<acc>> wide(2 * vectors);
  auto *hidden = wide.data(), *row = hidden + vectors;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Lanes<acc>* sums = call.sums + chunk * c * vectors;
    const int64_t last = std::min((chunk + 1) * call.per_chunk, call.tokens);
    for (int64_t t = chunk * call.per_chunk; t < last; ++t) {
      const scalar* g = call.g + t * call.features;
      if (call.h != nullptr) {
        acc* to = reinterpret_cast<acc*>(hidden);
        for (int64_t k = 0; k < r; ++k) to[k] = static_cast<acc>(call.h[t * r + k]);
        for (int64_t j = 0; j < c; ++j) {
          const acc p = static_cast<acc>(g[mixing.columns[j]]);
          for (int64_t v = 0; v < vectors; ++v) sums[j * vectors + v].lanes += p * hidden[v].lanes;
        }
      }
      if (call.dh != nullptr) {
        for (int64_t v = 0; v < vectors; ++v) row[v].lanes = Vector<acc>{};
        for (int64_t j = 0; j < c; ++j) {
          const acc p = static_cast<acc>(g[mixing.columns[j]]);
          for (int64_t v = 0; v < vectors; ++v) row[v].lanes += p * mixing.by_row[j * vectors + v].lanes;
        }
        const acc* from = reinterpret_cast<const acc*>(row);
        for (int64_t k = 0; k < r; ++k) call.dh[t * r + k] = static_cast<scalar>(from[k]);
      }
    }
  }
}

TCURLORA_FOR_EACH_TARGET(change, Change, change_tokens)
TCURLORA_FOR_EACH_TARGET(change_back, ChangeBack, change_back_chunks)

// scale * diag(gain) times the sum of the chunks, in the order of the chunks; zeros for all other slices.
template <typename acc>
Tensor core_gradient(const std::vector<Lanes<acc>>& sums, int64_t chunks, const Riding& adapter) {
  const int64_t c = adapter.c(), r = adapter.r(), pitch = padded(r);
  const acc* partial = reinterpret_cast<const acc*>(sums.data());
  Tensor gradient = at::cpu::empty(adapter.core.sizes(), adapter.core.options());
  const Tensor gain = adapter.gain.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gradient.scalar_type(), "tcurlora_core", [&] {
    scalar_t* to = gradient.mutable_data_ptr<scalar_t>();
    const scalar_t* factors = gain.const_data_ptr<scalar_t>();
    if (adapter.core.size(0) > 1) std::fill_n(to, gradient.numel(), scalar_t(0));
    to += adapter.slice_index * c * r;
    for (int64_t j = 0; j < c; ++j) {
      const double factor = adapter.scale * static_cast<double>(factors[j]);
      for (int64_t k = 0; k < r; ++k) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          total += static_cast<double>(partial[(chunk * c + j) * pitch + k]);
        }
        to[j * r + k] = static_cast<scalar_t>(factor * total);
      }
    }
  });
  return gradient;
}

}  // namespace

Tensor changed_input(const Tensor& x, const Tensor& h, const Riding& adapter) {
  const Tensor rows = x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(), dense = h.contiguous();
  const Tensor columns = adapter.columns.contiguous();
  const int64_t tokens = x.size(0), features = x.size(1);
  Tensor changed = at::cpu::empty({tokens, features}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "tcurlora_ride", [&] {
    const Mixing<acc_t<scalar_t>> mixing(adapter, columns, features, true);
    const Change<scalar_t> call{
        mixing, features, rows.stride(0), rows.const_data_ptr<scalar_t>(), dense.const_data_ptr<scalar_t>(),
        changed.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, tokens, kTokens, [&](int64_t begin, int64_t end) { change(call, begin, end); });
  });
  return changed;
}

std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Riding& adapter, bool needs_h) {
  const Tensor dense = g.contiguous(), dense_h = h.has_value() ? h->contiguous() : Tensor();
  const Tensor columns = adapter.columns.contiguous();
  const int64_t tokens = g.size(0), c = adapter.c(), r = adapter.r();
  const int64_t per_chunk = std::max(kTokens, ceil_div(tokens, kChunks)), chunks = ceil_div(tokens, per_chunk);
  Tensor dh, dcore;
  if (needs_h) dh = at::cpu::empty({tokens, r}, g.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, g.scalar_type(), "tcurlora_ride_back", [&] {
    using acc = acc_t<scalar_t>;
    const Mixing<acc> mixing(adapter, columns, g.size(1), false);
    std::vector<Lanes<acc>> sums(h.has_value() ? chunks * c * padded(r) / kLanes : 0, Lanes<acc>{});
    const ChangeBack<scalar_t> call{
        mixing, tokens, g.size(1), per_chunk, dense.const_data_ptr<scalar_t>(),
        h.has_value() ? dense_h.const_data_ptr<scalar_t>() : nullptr,
        needs_h ? dh.mutable_data_ptr<scalar_t>() : nullptr, sums.data()};
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { change_back(call, begin, end); });
    if (h.has_value()) dcore = core_gradient(sums, chunks, adapter);
  });
  return {dh, dcore};
}

}  // namespace tcurlora::cpu
