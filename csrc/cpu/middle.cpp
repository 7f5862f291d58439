#include "middle.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "phases.h"
#include "targets.h"

namespace tcurlora::cpu {
namespace {

// Blocks of 8 tokens whose contributions to the core's gradient are summed at once: 64 tokens, 200 KB for UNETR's qkv.
constexpr int64_t kBlocks = 8;
// The core's gradient is summed in at most this many chunks of tokens, and in fewer where their sums would have more
// than kPartials elements. The chunks do not depend on the number of threads.
constexpr int64_t kChunks = 64;
constexpr int64_t kPartials = 1 << 22;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the kernels need of a stack: sizes, u times the scale in the type of the sums, and one row of phases per slice.
template <typename acc>
struct Middle {
  Groups groups;
  int64_t n, c, r;
  double scale;
  c10::SmallVector<const Phase*, 4> phases;
  c10::SmallVector<acc, 64> u;  // (S, c, r)

  explicit Middle(const Stack& stack)
      : groups{stack.slices(), stack.transform}, n(stack.num_slices), c(stack.c()), r(stack.r()), scale(stack.scale) {
    for (int64_t j = 0; j < n; ++j) phases.push_back(phases_of(groups, stack.first_slice + j));
    const Tensor core = stack.core.contiguous();
    u.resize(core.numel());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, core.scalar_type(), "tcurlora_core", [&] {
      const scalar_t* from = core.const_data_ptr<scalar_t>();
      for (size_t e = 0; e < u.size(); ++e) u[e] = static_cast<acc>(scale * static_cast<double>(from[e]));
    });
  }

  int64_t hidden() const { return groups.slices * r; }  // elements of h per token
  int64_t wide() const { return groups.slices * c; }    // elements of m or p per token and slice
};

template <typename scalar>
struct Forward {
  using acc = acc_t<scalar>;
  const Middle<acc>& middle;
  int64_t tokens;
  const scalar* h;
  scalar* m;
  int64_t scratch() const { return middle.hidden() + 2 * middle.wide(); }
};

// Computes m for blocks of 8 tokens.
template <typename scalar>
TCURLORA_INLINE void forward_blocks(
    const Forward<scalar>& call, int64_t begin, int64_t end, Vector<acc_t<scalar>>* scratch) {
  const auto& [groups, n, c, r, scale, phases, u] = call.middle;
  const int64_t hidden = groups.slices * r, wide = groups.slices * c;
  auto *h = scratch, *z = h + hidden, *m = z + wide;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLanes, count = std::min(call.tokens - first, kLanes);
    load(call.h + first * hidden, hidden, count, hidden, h);
    multiply<false>(groups, u.data(), c, r, h, z);
    for (int64_t j = 0; j < n; ++j) {
      rotate<acc_t<scalar>>(groups, phases[j], c, z, m);
      store(m, wide, call.m + (first * n + j) * wide, n * wide, count);
    }
  }
}

template <typename scalar>
struct Backward {
  using acc = acc_t<scalar>;
  const Middle<acc>& middle;
  int64_t tokens;
  const scalar* p;
  const scalar* h;  // null where the core's gradient is not asked for
  scalar* dh;       // null where dh is not asked for
  int64_t per_chunk;  // blocks of 8 tokens
  acc* partial;       // (chunks, S, c, r)
  int64_t scratch() const { return (kBlocks + 1) * (middle.hidden() + middle.wide()); }
};

// Computes dh and the partial core gradients of chunks of tokens.
template <typename scalar>
TCURLORA_INLINE void backward_blocks(
    const Backward<scalar>& call, int64_t begin, int64_t end, Vector<acc_t<scalar>>* scratch) {
  using acc = acc_t<scalar>;
  const auto& [groups, n, c, r, scale, phases, u] = call.middle;
  const int64_t hidden = groups.slices * r, wide = groups.slices * c;
  auto *p = scratch, *dh = p + wide, *P = dh + hidden, *h = P + kBlocks * wide;
  const int64_t last = std::min(end * call.per_chunk, ceil_div(call.tokens, kLanes));
  for (int64_t block = begin * call.per_chunk, held = 0; block < last; ++block) {
    const int64_t first = block * kLanes, count = std::min(call.tokens - first, kLanes);
    std::fill_n(P + held * wide, wide, Vector<acc>{});
    for (int64_t j = 0; j < n; ++j) {
      load(call.p + (first * n + j) * wide, n * wide, count, wide, p);
      rotate_back<acc>(groups, phases[j], c, p, P + held * wide);
    }
    if (call.dh != nullptr) {
      multiply<true>(groups, u.data(), c, r, P + held * wide, dh);
      store(dh, hidden, call.dh + first * hidden, hidden, count);
    }
    if (call.h != nullptr) {
      load(call.h + first * hidden, hidden, count, hidden, h + held * hidden);
      const int64_t chunk = block / call.per_chunk;
      if (++held == kBlocks || block + 1 == last || (block + 1) / call.per_chunk != chunk) {
        outer<acc>(groups, P, h, held, c, r, call.partial + chunk * u.size());
        held = 0;
      }
    }
  }
}

// Both kernels are compiled for several instruction sets and chosen at run time: a wheel has to run on every x86-64.
#define TCURLORA_KERNEL(name, target)                                                                               \
  template <typename scalar>                                                                                        \
  target void name(const Forward<scalar>& call, int64_t begin, int64_t end, Vector<acc_t<scalar>>* scratch) {       \
    forward_blocks(call, begin, end, scratch);                                                                      \
  }                                                                                                                 \
  template <typename scalar>                                                                                        \
  target void name(const Backward<scalar>& call, int64_t begin, int64_t end, Vector<acc_t<scalar>>* scratch) {      \
    backward_blocks(call, begin, end, scratch);                                                                     \
  }

TCURLORA_KERNEL(any, )
#if defined(__x86_64__)
TCURLORA_KERNEL(avx2, __attribute__((target("avx2,fma,f16c"))))
TCURLORA_KERNEL(avx512, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))))
#endif
#undef TCURLORA_KERNEL

template <typename Call>
void run(const Call& call, int64_t begin, int64_t end) {
  // Small calls use memory on the call stack: an aligned allocation would take a tenth of a microsecond.
  constexpr int64_t kSmall = 64;
  Lanes<typename Call::acc> small[kSmall];
  std::vector<Lanes<typename Call::acc>> large(call.scratch() > kSmall ? call.scratch() : 0);
  auto* scratch = large.empty() ? &small->lanes : &large.data()->lanes;
#if defined(__x86_64__)
  if (has_avx512()) return avx512(call, begin, end, scratch);
  if (has_avx2()) return avx2(call, begin, end, scratch);
#endif
  any(call, begin, end, scratch);
}

// scale times the sum of the chunks, in the order of the chunks.
template <typename acc>
Tensor sum_of_chunks(const std::vector<acc>& partial, int64_t chunks, const Stack& stack) {
  const int64_t size = stack.core.numel();
  std::vector<double> total(size, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t e = 0; e < size; ++e) total[e] += static_cast<double>(partial[chunk * size + e]);
  }
  Tensor gradient = at::cpu::empty(stack.core.sizes(), stack.core.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gradient.scalar_type(), "tcurlora_core", [&] {
    scalar_t* du = gradient.mutable_data_ptr<scalar_t>();
    for (int64_t e = 0; e < size; ++e) du[e] = static_cast<scalar_t>(stack.scale * total[e]);
  });
  return gradient;
}

}  // namespace

Tensor middle_forward(const Tensor& h, const Stack& stack) {
  const Tensor dense = h.contiguous();
  const int64_t tokens = h.size(0);
  Tensor m = at::cpu::empty({tokens * stack.num_slices, stack.c() * stack.slices()}, h.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "tcurlora_middle_forward", [&] {
    const Middle<acc_t<scalar_t>> middle(stack);
    const Forward<scalar_t> call{
        middle, tokens, dense.const_data_ptr<scalar_t>(), m.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, ceil_div(tokens, kLanes), kBlocks, [&](int64_t begin, int64_t end) { run(call, begin, end); });
  });
  return m;
}

std::tuple<Tensor, Tensor> middle_backward(
    const Tensor& p, const OptionalTensor& h, const Stack& stack, bool needs_h) {
  const Tensor dense_p = p.contiguous(), dense_h = h.has_value() ? h->contiguous() : Tensor();
  const int64_t tokens = p.size(0) / stack.num_slices, size = stack.core.numel(), blocks = ceil_div(tokens, kLanes);
  const int64_t most = std::clamp<int64_t>(kPartials / std::max<int64_t>(size, 1), 8, kChunks);
  const int64_t per_chunk = std::max(kBlocks, ceil_div(blocks, most)), chunks = ceil_div(blocks, per_chunk);
  Tensor dh, dcore;
  if (needs_h) dh = at::cpu::empty({tokens, stack.r() * stack.slices()}, p.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, p.scalar_type(), "tcurlora_middle_backward", [&] {
    using acc = acc_t<scalar_t>;
    const Middle<acc> middle(stack);
    std::vector<acc> partial(h.has_value() ? chunks * size : 0, acc(0));
    const Backward<scalar_t> call{
        middle, tokens, dense_p.const_data_ptr<scalar_t>(),
        h.has_value() ? dense_h.const_data_ptr<scalar_t>() : nullptr,
        needs_h ? dh.mutable_data_ptr<scalar_t>() : nullptr, per_chunk, partial.data()};
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { run(call, begin, end); });
    if (h.has_value()) dcore = sum_of_chunks(partial, chunks, stack);
  });
  return {dh, dcore};
}

}  // namespace tcurlora::cpu
