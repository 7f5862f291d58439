#include "middle.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

// Compiled for several instruction sets, chosen when the library is loaded: a wheel has to run on every x86-64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TCURLORA_CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define TCURLORA_CLONES
#endif

namespace tcurlora::cpu {
namespace {

// Tokens that one task takes through one group: its tiles of h and p, 4 and 12 KiB, stay in the first-level cache.
constexpr int64_t kTokens = 64;
// The core's gradient is summed in chunks of tokens, of this many at least and in at most kChunks: the same chunks
// whatever the number of threads, and 64 copies of B's gradient (18,000 numbers for UNETR's qkv) at most.
constexpr int64_t kPartial = 256;
constexpr int64_t kChunks = 64;
// Rows and columns whose sums are held in registers: 8 vectors of 8 floats hide the latency of the additions.
constexpr int64_t kRows = 4;
constexpr int64_t kLane = 16;

// Accumulation happens in at least float32.
template <typename scalar>
using acc_t = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// A vector of 8 numbers; the compiler splits it where the instruction set has shorter ones.
template <typename acc>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};

// As product() below, for `count` rows and one lane of 16 columns: 2 * count vectors of sums in registers.
template <int64_t count, typename acc>
inline __attribute__((always_inline)) void lane_of(
    const acc* left, int64_t row_step, int64_t k_step, const acc* right, acc* out, int64_t depth, int64_t columns,
    bool accumulate) {
  using vector = typename Vector<acc>::type;
  vector low[count], high[count];
  for (int64_t row = 0; row < count; ++row) low[row] = high[row] = vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const vector* line = reinterpret_cast<const vector*>(right + k * columns);
    const vector first = line[0], second = line[1];
#pragma GCC unroll 4
    for (int64_t row = 0; row < count; ++row) {
      const acc value = left[row * row_step + k * k_step];
      low[row] += first * value;
      high[row] += second * value;
    }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < count; ++row) {
    vector* to = reinterpret_cast<vector*>(out + row * columns);
    to[0] = accumulate ? to[0] + low[row] : low[row];
    to[1] = accumulate ? to[1] + high[row] : high[row];
  }
}

// out (rows, columns) {=, +=} sum_k left[row * row_step + k * k_step] * right[k * columns + column].
template <typename acc>
inline __attribute__((always_inline)) void product_of(
    const acc* left, int64_t row_step, int64_t k_step, const acc* right, acc* out, int64_t rows, int64_t depth,
    int64_t columns, bool accumulate) {
  int64_t column = 0;
  for (; column + kLane <= columns; column += kLane) {
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      lane_of<kRows>(
          left + row * row_step, row_step, k_step, right + column, out + row * columns + column, depth, columns,
          accumulate);
    }
    for (; row < rows; ++row) {
      lane_of<1>(
          left + row * row_step, row_step, k_step, right + column, out + row * columns + column, depth, columns,
          accumulate);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t rest = column; rest < columns; ++rest) {
      acc sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += left[row * row_step + k * k_step] * right[k * columns + rest];
      acc* to = out + row * columns + rest;
      *to = accumulate ? *to + sum : sum;
    }
  }
}

TCURLORA_CLONES void product(
    const float* left, int64_t row_step, int64_t k_step, const float* right, float* out, int64_t rows, int64_t depth,
    int64_t columns, bool accumulate) {
  product_of(left, row_step, k_step, right, out, rows, depth, columns, accumulate);
}

TCURLORA_CLONES void product(
    const double* left, int64_t row_step, int64_t k_step, const double* right, double* out, int64_t rows, int64_t depth,
    int64_t columns, bool accumulate) {
  product_of(left, row_step, k_step, right, out, rows, depth, columns, accumulate);
}

// One group of blocks: where it lies, and its width in numbers of h (w*r) and of m for all layers (n*w*c).
struct Group {
  int64_t first, hidden, columns, at;
  bool pair;
};

// The groups of a stack, and the place of each in an array of all of B: `size` numbers, group by group.
struct Layout {
  Groups groups;
  std::vector<Group> all;
  int64_t size = 0;

  explicit Layout(const Stack& stack) : groups{stack.slices(), stack.transform} {
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t w = groups.width(g), hidden = w * stack.r(), columns = stack.num_slices * w * stack.c();
      all.push_back({groups.first_block(g), hidden, columns, size, groups.is_pair(g)});
      size += hidden * columns;
    }
  }
};

// Calls visit(group, e, row of B for u_re, row for u_im, column of layer j, phase) for every entry of the core.
template <typename Visit>
void for_each_entry(const Stack& stack, const Layout& layout, const Visit& visit) {
  const int64_t c = stack.c(), r = stack.r();
  for (size_t g = 0; g < layout.all.size(); ++g) {
    const Group& group = layout.all[g];
    for (int64_t j = 0; j < stack.num_slices; ++j) {
      Phase phase = phase_of(layout.groups, g, stack.first_slice + j);
      phase.re *= stack.scale;
      phase.im *= stack.scale;
      for (int64_t a = 0; a < c; ++a) {
        for (int64_t b = 0; b < r; ++b) {
          const int64_t column = j * (group.pair ? 2 : 1) * c + a;
          visit(group, group.first * c * r + a * r + b, b * group.columns + column, (r + b) * group.columns + column, phase);
        }
      }
    }
  }
}

// B^T of every group for all n layers side by side: (w*r, n*w*c), row i the weights of h_i. With `transposed`, B.
template <typename acc>
std::vector<acc> blocks_of(const Stack& stack, const Layout& layout, bool transposed) {
  const Tensor core = stack.core.to(at::kDouble).contiguous();
  const double* u = core.const_data_ptr<double>();
  const int64_t c = stack.c(), imaginary = c * stack.r();
  std::vector<acc> values(layout.size);
  for_each_entry(stack, layout, [&](const Group& group, int64_t e, int64_t of_re, int64_t of_im, const Phase& phase) {
    const auto put = [&](int64_t at, double value) {
      const int64_t row = at / group.columns, column = at % group.columns;
      values[group.at + (transposed ? column * group.hidden + row : at)] = static_cast<acc>(value);
    };
    if (!group.pair) {
      put(of_re, phase.re * u[e]);
      return;
    }
    const double real = phase.re * u[e] - phase.im * u[e + imaginary];
    const double imag = phase.im * u[e] + phase.re * u[e + imaginary];
    put(of_re, real);
    put(of_re + c, imag);
    put(of_im, -imag);
    put(of_im + c, real);
  });
  return values;
}

// Copies `parts` runs of `width` numbers, `step` apart, of every token between a tensor and a tile.
template <typename from_t, typename to_t>
void copy_runs(
    const from_t* from, int64_t from_token, int64_t from_part, to_t* to, int64_t to_token, int64_t to_part,
    int64_t tokens, int64_t parts, int64_t width) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < parts; ++j) {
      const from_t* source = from + t * from_token + j * from_part;
      to_t* target = to + t * to_token + j * to_part;
      for (int64_t e = 0; e < width; ++e) target[e] = static_cast<to_t>(source[e]);
    }
  }
}

// Tiles of h (T, S, r) and p or m (T, n, S, c) for one group and a run of tokens.
template <typename scalar>
struct Tiles {
  using acc = acc_t<scalar>;
  const Stack& stack;
  std::vector<acc> hidden, wide;

  explicit Tiles(const Stack& stack_, int64_t tokens)
      : stack(stack_),
        hidden(tokens * 2 * stack_.r()),
        wide(tokens * stack_.num_slices * 2 * stack_.c()) {}

  void load_hidden(const scalar* h, const Group& group, int64_t begin, int64_t tokens) {
    const int64_t q = stack.slices() * stack.r();
    copy_runs(h + begin * q + group.first * stack.r(), q, 0, hidden.data(), group.hidden, 0, tokens, 1, group.hidden);
  }
  void store_hidden(scalar* h, const Group& group, int64_t begin, int64_t tokens) const {
    const int64_t q = stack.slices() * stack.r();
    copy_runs(hidden.data(), group.hidden, 0, h + begin * q + group.first * stack.r(), q, 0, tokens, 1, group.hidden);
  }
  void load_wide(const scalar* p, const Group& group, int64_t begin, int64_t tokens) {
    const int64_t n = stack.num_slices, q = stack.slices() * stack.c(), width = group.columns / n;
    copy_runs(
        p + begin * n * q + group.first * stack.c(), n * q, q, wide.data(), group.columns, width, tokens, n, width);
  }
  void store_wide(scalar* m, const Group& group, int64_t begin, int64_t tokens) const {
    const int64_t n = stack.num_slices, q = stack.slices() * stack.c(), width = group.columns / n;
    copy_runs(
        wide.data(), group.columns, width, m + begin * n * q + group.first * stack.c(), n * q, q, tokens, n, width);
  }
};

template <typename scalar>
void forward_kernel(const scalar* h, scalar* m, int64_t tokens, const Stack& stack) {
  const Layout layout(stack);
  const auto blocks = blocks_of<acc_t<scalar>>(stack, layout, false);
  at::parallel_for(0, (tokens + kTokens - 1) / kTokens, 1, [&](int64_t begin, int64_t end) {
    Tiles<scalar> tiles(stack, kTokens);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTokens, count = std::min(tokens - first, kTokens);
      for (const Group& group : layout.all) {
        tiles.load_hidden(h, group, first, count);
        product(
            tiles.hidden.data(), group.hidden, 1, blocks.data() + group.at, tiles.wide.data(), count, group.hidden,
            group.columns, false);
        tiles.store_wide(m, group, first, count);
      }
    }
  });
}

template <typename scalar>
void backward_kernel(const scalar* p, scalar* dh, int64_t tokens, const Stack& stack) {
  const Layout layout(stack);
  const auto blocks = blocks_of<acc_t<scalar>>(stack, layout, true);
  at::parallel_for(0, (tokens + kTokens - 1) / kTokens, 1, [&](int64_t begin, int64_t end) {
    Tiles<scalar> tiles(stack, kTokens);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTokens, count = std::min(tokens - first, kTokens);
      for (const Group& group : layout.all) {
        tiles.load_wide(p, group, first, count);
        product(
            tiles.wide.data(), group.columns, 1, blocks.data() + group.at, tiles.hidden.data(), count, group.columns,
            group.hidden, false);
        tiles.store_hidden(dh, group, first, count);
      }
    }
  });
}

template <typename scalar>
Tensor core_gradient_of(const Tensor& p, const Tensor& h, const Stack& stack) {
  using acc = acc_t<scalar>;
  const Layout layout(stack);
  const int64_t tokens = h.size(0), per_chunk = std::max(kPartial, (tokens + kChunks - 1) / kChunks);
  const int64_t chunks = (tokens + per_chunk - 1) / per_chunk;
  std::vector<acc> partial(chunks * layout.size, acc(0));
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Tiles<scalar> tiles(stack, kTokens);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(tokens, (chunk + 1) * per_chunk);
      for (int64_t first = chunk * per_chunk; first < last; first += kTokens) {
        const int64_t count = std::min(last - first, kTokens);
        for (const Group& group : layout.all) {
          tiles.load_hidden(h.const_data_ptr<scalar>(), group, first, count);
          tiles.load_wide(p.const_data_ptr<scalar>(), group, first, count);
          product(
              tiles.hidden.data(), 1, group.hidden, tiles.wide.data(), partial.data() + chunk * layout.size + group.at,
              group.hidden, count, group.columns, true);
        }
      }
    }
  });
  std::vector<double> total(layout.size, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t e = 0; e < layout.size; ++e) total[e] += static_cast<double>(partial[chunk * layout.size + e]);
  }
  Tensor gradient = at::zeros(stack.core.sizes(), stack.core.options().dtype(at::kDouble));
  double* du = gradient.mutable_data_ptr<double>();
  const int64_t c = stack.c(), imaginary = c * stack.r();
  for_each_entry(stack, layout, [&](const Group& group, int64_t e, int64_t of_re, int64_t of_im, const Phase& phase) {
    const double* block = total.data() + group.at;
    if (!group.pair) {
      du[e] += phase.re * block[of_re];
      return;
    }
    const double da = block[of_re] + block[of_im + c], db = block[of_re + c] - block[of_im];
    du[e] += phase.re * da + phase.im * db;
    du[e + imaginary] += phase.re * db - phase.im * da;
  });
  return gradient.to(stack.core.scalar_type());
}

}  // namespace

Tensor middle_forward(const Tensor& h, const Stack& stack) {
  const Tensor dense = h.contiguous();
  Tensor m = at::empty({h.size(0), stack.num_slices, stack.c() * stack.slices()}, h.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "tcurlora_middle_forward", [&] {
    forward_kernel<scalar_t>(
        dense.const_data_ptr<scalar_t>(), m.mutable_data_ptr<scalar_t>(), h.size(0), stack);
  });
  return m;
}

Tensor middle_backward(const Tensor& p, const Stack& stack) {
  const Tensor dense = p.contiguous();
  Tensor dh = at::empty({p.size(0), stack.r() * stack.slices()}, p.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, p.scalar_type(), "tcurlora_middle_backward", [&] {
    backward_kernel<scalar_t>(
        dense.const_data_ptr<scalar_t>(), dh.mutable_data_ptr<scalar_t>(), p.size(0), stack);
  });
  return dh;
}

Tensor core_gradient(const Tensor& p, const Tensor& h, const Stack& stack) {
  const Tensor dense_p = p.contiguous(), dense_h = h.contiguous();
  Tensor gradient;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "tcurlora_core_gradient", [&] {
    gradient = core_gradient_of<scalar_t>(dense_p, dense_h, stack);
  });
  return gradient;
}

}  // namespace tcurlora::cpu
