#include "bank.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "targets.h"

namespace tcurlora::cpu {
namespace {

// Tokens per task of a thread, tokens of one adapter that are summed as one piece, and pieces per task.
constexpr int64_t kTokens = 64, kPiece = 256, kPieces = 16;

// The cores and scale * gain as arrays in the type of the sums.
template <typename acc>
struct Many {
  int64_t c, r, pitch;  // pitch: elements from one core to the next
  const acc* cores;
  const int64_t* columns;
  std::vector<acc> factors;  // (c,)

  Many(const Cores& adapters, const Tensor& cores_, const Tensor& columns_, int64_t features)
      : c(adapters.c()), r(adapters.r()), pitch(cores_.stride(0)), cores(cores_.const_data_ptr<acc>()),
        columns(columns_.const_data_ptr<int64_t>()), factors(c) {
    const Tensor gain = adapters.gain.contiguous();
    for (int64_t j = 0; j < c; ++j) {
      TORCH_CHECK_INDEX(
          columns[j] >= 0 && columns[j] < features, "column ", columns[j], " is out of range: x has ", features,
          " features");
      factors[j] = static_cast<acc>(adapters.scale * static_cast<double>(gain.const_data_ptr<acc>()[j]));
    }
  }
};

// The cores themselves where each is dense: those of several layers may lie side by side.
Tensor dense_cores(const Tensor& cores) {
  const bool dense = cores.stride(2) == 1 && cores.stride(1) == cores.size(2);
  return dense ? cores : cores.contiguous();
}

template <typename acc>
TCURLORA_INLINE acc dot(const acc* a, const acc* b, int64_t size) {
  Vector<acc> sum = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    Vector<acc> left, right;
    read<acc>(a + k, left);
    read<acc>(b + k, right);
    sum += left * right;
  }
  acc lanes[kLanes], total = 0;
  std::memcpy(lanes, &sum, sizeof(sum));
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  for (; k < size; ++k) total += a[k] * b[k];
  return total;
}

// to += factor * from
template <typename acc>
TCURLORA_INLINE void add(acc* __restrict to, acc factor, const acc* __restrict from, int64_t size) {
  for (int64_t k = 0; k < size; ++k) to[k] += factor * from[k];
}

template <typename scalar>
TCURLORA_INLINE void widen(const scalar* from, int64_t size, acc_t<scalar>* to) {
  for (int64_t k = 0; k < size; ++k) to[k] = static_cast<acc_t<scalar>>(from[k]);
}

template <typename scalar>
struct ManyChange {
  const Many<acc_t<scalar>>& many;
  int64_t features, step;  // elements of a row of x, and from one row to the next
  const scalar* x;
  const scalar* h;  // (T, r)
  const int64_t* owners;
  scalar* changed;  // (T, features)
};

template <typename scalar>
TCURLORA_INLINE void change_tokens(const ManyChange<scalar>& call, int64_t begin, int64_t end) {
  using acc = acc_t<scalar>;
  const auto& many = call.many;
  std::vector<acc> h(many.r);
  for (int64_t t = begin; t < end; ++t) {
    scalar* to = call.changed + t * call.features;
    std::memcpy(to, call.x + t * call.step, call.features * sizeof(scalar));
    if (call.owners[t] < 0) continue;
    const acc* core = many.cores + call.owners[t] * many.pitch;
    widen(call.h + t * many.r, many.r, h.data());
    for (int64_t j = 0; j < many.c; ++j) {
      const acc change = many.factors[j] * dot(core + j * many.r, h.data(), many.r);
      scalar& entry = to[many.columns[j]];
      entry = static_cast<scalar>(static_cast<acc>(entry) + change);
    }
  }
}

// Tokens of one adapter, order[begin] to order[end], and where their sum goes.
template <typename acc>
struct Piece {
  int64_t owner, begin, end;
  acc* sum;  // (c, r), null where the cores' gradient is not asked for
};

template <typename scalar>
struct ManyBack {
  using acc = acc_t<scalar>;
  const Many<acc>& many;
  int64_t features;
  const scalar* g;  // (T, features)
  const scalar* h;  // (T, r), null where the cores' gradient is not asked for
  scalar* dh;       // (T, r), null where it is not asked for
  const int64_t* order;
  const Piece<acc>* pieces;
};

template <typename scalar>
TCURLORA_INLINE void back_pieces(const ManyBack<scalar>& call, int64_t begin, int64_t end) {
  using acc = acc_t<scalar>;
  const auto& many = call.many;
  const int64_t c = many.c, r = many.r;
  std::vector<acc> h(r), dh(r);
  for (const auto* piece = call.pieces + begin; piece < call.pieces + end; ++piece) {
    const acc* core = many.cores + piece->owner * many.pitch;
    for (int64_t at = piece->begin; at < piece->end; ++at) {
      const int64_t t = call.order[at];
      const scalar* g = call.g + t * call.features;
      if (call.h != nullptr) widen(call.h + t * r, r, h.data());
      std::fill(dh.begin(), dh.end(), acc(0));
      for (int64_t j = 0; j < c; ++j) {
        const acc p = many.factors[j] * static_cast<acc>(g[many.columns[j]]);
        if (call.h != nullptr) add(piece->sum + j * r, p, h.data(), r);
        if (call.dh != nullptr) add(dh.data(), p, core + j * r, r);
      }
      if (call.dh == nullptr) continue;
      for (int64_t k = 0; k < r; ++k) call.dh[t * r + k] = static_cast<scalar>(dh[k]);
    }
  }
}

TCURLORA_FOR_EACH_TARGET(many_change, ManyChange, change_tokens)
TCURLORA_FOR_EACH_TARGET(many_back, ManyBack, back_pieces)

// The pieces of all adapters. The first of an adapter sums into its gradient in `sums`, all further ones into `rest`.
template <typename acc>
std::vector<Piece<acc>> pieces_of(const Tensor& ends, acc* sums, int64_t size, std::vector<acc>& rest) {
  const int64_t* end = ends.const_data_ptr<int64_t>();
  std::vector<Piece<acc>> pieces;
  int64_t further = 0, begin = 0;
  for (int64_t owner = 0; owner < ends.size(0); begin = end[owner++]) {
    for (int64_t at = begin; at < end[owner]; at += kPiece) {
      pieces.push_back({owner, at, std::min(at + kPiece, end[owner]), nullptr});
      further += at > begin;
    }
  }
  if (sums == nullptr) return pieces;
  rest.assign(further * size, acc(0));
  further = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const bool first = i == 0 || pieces[i - 1].owner != pieces[i].owner;
    pieces[i].sum = first ? sums + pieces[i].owner * size : rest.data() + size * further++;
  }
  return pieces;
}

void require_between(const Tensor& indices, int64_t low, int64_t high, const char* name) {
  const int64_t* values = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    TORCH_CHECK_INDEX(
        values[i] >= low && values[i] <= high, name, " has ", values[i], ", expected numbers from ", low, " to ", high);
  }
}

}  // namespace

Tensor changed_input(const Tensor& x, const Tensor& h, const Cores& adapters, const Tensor& owners) {
  const Tensor rows = x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(), dense = h.contiguous();
  const Tensor cores = dense_cores(adapters.cores), columns = adapters.columns.contiguous();
  const Tensor of_tokens = owners.contiguous();
  require_between(of_tokens, -1, adapters.number() - 1, "owners");
  const int64_t tokens = x.size(0), features = x.size(1);
  Tensor changed = at::cpu::empty({tokens, features}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "tcurlora_ride_many", [&] {
    const Many<acc_t<scalar_t>> many(adapters, cores, columns, features);
    const ManyChange<scalar_t> call{
        many, features, rows.stride(0), rows.const_data_ptr<scalar_t>(), dense.const_data_ptr<scalar_t>(),
        of_tokens.const_data_ptr<int64_t>(), changed.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, tokens, kTokens, [&](int64_t begin, int64_t end) { many_change(call, begin, end); });
  });
  return changed;
}

std::tuple<Tensor, Tensor> changed_input_back(
    const Tensor& g, const OptionalTensor& h, const Cores& adapters, const Tensor& order, const Tensor& ends,
    bool needs_h) {
  const Tensor dense = g.contiguous(), dense_h = h.has_value() ? h->contiguous() : Tensor();
  const Tensor cores = dense_cores(adapters.cores), columns = adapters.columns.contiguous();
  const Tensor sorted = order.contiguous(), last = ends.contiguous();
  const int64_t tokens = g.size(0), size = adapters.c() * adapters.r();
  require_between(sorted, 0, tokens - 1, "order");
  require_between(last, 0, sorted.size(0), "ends");
  Tensor dh, dcores;
  if (needs_h) dh = at::zeros({tokens, adapters.r()}, g.options());  // those of the base have none
  if (h.has_value()) dcores = at::zeros(cores.sizes(), cores.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, g.scalar_type(), "tcurlora_ride_many_back", [&] {
    using acc = acc_t<scalar_t>;
    const Many<acc> many(adapters, cores, columns, g.size(1));
    std::vector<acc> rest;
    const auto pieces = pieces_of(last, h.has_value() ? dcores.mutable_data_ptr<acc>() : nullptr, size, rest);
    const ManyBack<scalar_t> call{
        many, g.size(1), dense.const_data_ptr<scalar_t>(), h.has_value() ? dense_h.const_data_ptr<scalar_t>() : nullptr,
        needs_h ? dh.mutable_data_ptr<scalar_t>() : nullptr, sorted.const_data_ptr<int64_t>(), pieces.data()};
    at::parallel_for(0, pieces.size(), kPieces, [&](int64_t begin, int64_t end) { many_back(call, begin, end); });
    if (rest.empty()) return;
    for (const auto& piece : pieces) {
      acc* sum = dcores.mutable_data_ptr<acc>() + piece.owner * size;
      if (piece.sum != sum) add(sum, acc(1), piece.sum, size);
    }
  });
  return {dh, dcores};
}

}  // namespace tcurlora::cpu
