// The CUDA kernels' own code, run on the CPU and compared with the definition. Needs no GPU and no torch; with the CUDA
// headers on the include path it covers float16 and bfloat16 too. `quick` as argument leaves most sizes out: for builds
// that check every access, which are ten times as slow.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/cuda/core_gradient.h"
#include "../../csrc/cuda/middle_backward.h"
#include "../../csrc/cuda/middle_forward.h"
#include "../../csrc/cuda/ranks.h"
#include "definition.h"
#include "host_launch.h"

namespace {

using namespace tcurlora;
using namespace tcurlora::cuda;
using definition::Numbers;
using host::Order;

int checks = 0, failures = 0;

void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// An array between two guard zones, NaN all over: what is not written shows, and so does what is read or written
// outside.
template <typename scalar>
class Guarded {
 public:
  static constexpr int64_t guard = 64;

  explicit Guarded(int64_t size) : memory_(size + 2 * guard) {
    std::memset(static_cast<void*>(memory_.data()), 0xff, bytes());
  }
  Guarded(const Numbers& numbers) : Guarded(static_cast<int64_t>(numbers.size())) {
    for (size_t i = 0; i < numbers.size(); ++i) data()[i] = Narrow<scalar>::from(numbers[i]);
  }
  scalar* data() { return memory_.data() + guard; }
  int64_t size() const { return static_cast<int64_t>(memory_.size()) - 2 * guard; }
  size_t bytes() const { return memory_.size() * sizeof(scalar); }

  Numbers numbers() {
    Numbers all(size());
    for (int64_t i = 0; i < size(); ++i) all[i] = static_cast<double>(widened(data()[i]));
    return all;
  }
  bool same_bits(const Guarded& other) const {
    return std::memcmp(static_cast<const void*>(memory_.data()), other.memory_.data(), bytes()) == 0;
  }
  bool guards_untouched() const {
    const auto* all = reinterpret_cast<const unsigned char*>(memory_.data());
    const size_t zone = guard * sizeof(scalar);
    for (size_t i = 0; i < zone; ++i) {
      if (all[i] != 0xff || all[bytes() - 1 - i] != 0xff) return false;
    }
    return true;
  }

 private:
  std::vector<scalar> memory_;
};

Numbers random_numbers(int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  Numbers numbers(size);
  for (double& number : numbers) number = uniform(generator);
  return numbers;
}

// Relative accuracy of a stored number, half a unit in its last place; that of sums, relative to the largest.
template <typename scalar>
struct Accuracy {
  static constexpr double stored = std::is_same_v<scalar, double> ? 0 : std::is_same_v<scalar, float> ? 0 : 0x1p-11;
  static constexpr double summed = std::is_same_v<scalar, double> ? 1e-12 : 1e-5;
};
#if TCURLORA_HALVES
template <>
struct Accuracy<__nv_bfloat16> {
  static constexpr double stored = 0x1p-8, summed = 1e-5;
};
#endif

template <typename scalar, typename stored = scalar>
void expect_close(const Numbers& found, const Numbers& expected, const std::string& what) {
  double largest = std::numeric_limits<double>::min(), worst = 0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double allowed = Accuracy<stored>::stored * std::abs(expected[i]) + Accuracy<scalar>::summed * largest;
    const double excess = std::abs(found[i] - expected[i]) / allowed;
    worst = std::isnan(excess) ? std::numeric_limits<double>::infinity() : std::max(worst, excess);
  }
  expect(found.size() == expected.size() && worst <= 1, what + ": error " + std::to_string(worst) + " of the allowed");
}

template <typename scalar>
const char* type_name() {
  if constexpr (std::is_same_v<scalar, float>) return "float32";
  if constexpr (std::is_same_v<scalar, double>) return "float64";
  return sizeof(widened(scalar{})) == 4 && Accuracy<scalar>::stored == 0x1p-8 ? "bfloat16" : "float16";
}

// Runs a launch in both orders into poisoned arrays; the one returned was written in the usual order.
template <typename scalar, typename Launch>
Guarded<scalar> written(int64_t size, const std::string& what, const Launch& launch) {
  Guarded<scalar> output(size), reversed(size);
  launch(output.data(), Order::forwards);
  launch(reversed.data(), Order::backwards);
  expect(output.guards_untouched(), what + ": wrote outside its output");
  expect(output.same_bits(reversed), what + ": depends on the order of threads or blocks");
  return output;
}

template <typename scalar, typename result>
void check_sum_of_chunks(
    const Sizes& sizes, Guarded<acc_t<scalar>>& sums, const Numbers& expected, const std::string& what) {
  auto gradient = written<result>(sizes.core(), what, [&](result* to, Order order) {
    const SumOfChunks<acc_t<scalar>, result> body{sizes.core(), chunk_count(sizes), sums.data(), to};
    host::launch(body, body.grid(), order);
  });
  using coarser = std::conditional_t<std::is_same_v<scalar, double> && !std::is_same_v<result, double>, float, scalar>;
  expect_close<coarser, result>(gradient.numbers(), expected, what);
}

// All three operations at one set of sizes, by the kernel of one rank (0: any).
template <typename scalar, int rank>
void check(const Sizes& sizes) {
  using acc = acc_t<scalar>;
  const std::string name = std::string(type_name<scalar>()) + " rank " + std::to_string(rank) + ", T=" +
                           std::to_string(sizes.tokens) + " S=" + std::to_string(sizes.slices) + " c=" +
                           std::to_string(sizes.c) + " r=" + std::to_string(sizes.r) + " first=" +
                           std::to_string(sizes.first_slice) + " n=" + std::to_string(sizes.num_slices) +
                           (sizes.transform == Transform::dct ? " dct" : " dft");
  const int64_t wide = sizes.tokens * sizes.num_slices * sizes.columns();
  Guarded<acc> core(random_numbers(sizes.core(), 1));
  Guarded<scalar> h(random_numbers(sizes.tokens * sizes.hidden(), 2)), p(random_numbers(wide, 3));

  auto m = written<scalar>(wide, name + ": m", [&](scalar* to, Order order) {
    using Body = MiddleForward<scalar, rank>;
    host::launch(Body{sizes, h.data(), core.data(), to}, Body::grid(sizes), order);
  });
  expect_close<scalar>(m.numbers(), definition::middle_forward(sizes, h.numbers(), core.numbers()), name + ": m");

  auto dh = written<scalar>(sizes.tokens * sizes.hidden(), name + ": dh", [&](scalar* to, Order order) {
    using Body = MiddleBackward<scalar, rank>;
    host::launch(Body{sizes, p.data(), core.data(), to}, Body::grid(sizes), order);
  });
  expect_close<scalar>(dh.numbers(), definition::middle_backward(sizes, p.numbers(), core.numbers()), name + ": dh");

  auto sums = written<acc>(core_gradient_workspace(sizes), name + ": chunks", [&](acc* to, Order order) {
    using Body = ChunkSums<scalar, rank>;
    host::launch(Body{sizes, chunk_tokens(sizes), p.data(), h.data(), to}, Body::grid(sizes), order);
  });
  const Numbers gradient = definition::core_gradient(sizes, p.numbers(), h.numbers());
  check_sum_of_chunks<scalar, float>(sizes, sums, gradient, name + ": du in float32");
  check_sum_of_chunks<scalar, double>(sizes, sums, gradient, name + ": du in float64");
#if TCURLORA_HALVES
  check_sum_of_chunks<scalar, __half>(sizes, sums, gradient, name + ": du in float16");
  check_sum_of_chunks<scalar, __nv_bfloat16>(sizes, sums, gradient, name + ": du in bfloat16");
#endif
}

template <typename scalar>
void check_rank(const Sizes& sizes) {
  check<scalar, 0>(sizes);
  if (sizes.c != sizes.r) return;
  if (sizes.r == 1) check<scalar, 1>(sizes);
  if (sizes.r == 2) check<scalar, 2>(sizes);
  if (sizes.r == 4) check<scalar, 4>(sizes);
  if (sizes.r == 8) check<scalar, 8>(sizes);
  if (sizes.r == 16) check<scalar, 16>(sizes);
}

void check_all_types(Sizes sizes) {
  for (const Transform transform : {Transform::dft, Transform::dct}) {
    sizes.transform = transform;
    check_rank<double>(sizes);
    check_rank<float>(sizes);
#if TCURLORA_HALVES
    check_rank<__half>(sizes);
    check_rank<__nv_bfloat16>(sizes);
#endif
  }
}

void check_few_sizes() {
  for (const int rank : {1, 2, 4, 8, 16}) {
    for (const int64_t tokens : {0, 1, 37}) check_all_types({tokens, 4, rank, rank, 1, 2, Transform::dft, -1.7});
  }
  check_all_types({19, 5, 5, 3, 4, 1, Transform::dft, 0.3});
  check_all_types({7, 48, 8, 8, 17, 3, Transform::dft, 1.0});
  check_all_types({3, 200, 1, 1, 0, 200, Transform::dft, 1.0});
}

void check_many_sizes() {
  const Transform dft = Transform::dft;
  for (const int rank : {1, 2, 4, 8, 16}) {
    for (const int slices : {1, 2, 3, 7, 12}) {
      const int first = slices / 3, n = std::min(3, slices - first);
      for (const int64_t tokens : {5, 67}) check_all_types({tokens, slices, rank, rank, first, n, dft, -1.7});
    }
  }
  const int odd[][2] = {{1, 2}, {3, 5}, {5, 3}, {7, 1}, {1, 9}, {12, 8}, {8, 12}, {6, 6}, {33, 20}};
  for (const auto& [c, r] : odd) {
    for (const int slices : {1, 2, 5, 6}) check_all_types({19, slices, c, r, slices - 1, 1, dft, 0.3});
  }
  // Several blocks across, streams of several steps, chunks of more than 16 tokens.
  check_all_types({35, 48, 8, 8, 17, 3, dft, 1.0});
  check_all_types({20, 199, 2, 2, 190, 8, dft, 1.0});
  check_all_types({21, 200, 5, 4, 0, 8, dft, 1.0});
  check<float, 16>({1500, 48, 16, 16, 40, 2, dft, 1.0});
  check<float, 0>({1500, 48, 16, 16, 40, 2, dft, 1.0});
  check<float, 4>({70000, 1, 4, 4, 0, 1, dft, 1.0});
  check<double, 1>({9001, 6, 1, 1, 1, 4, dft, 1.0});
  // Phases of so many slices that blocks become narrower to hold them.
  check_all_types({3, 150, 3, 3, 0, 150, dft, 1.0});
}

// Phases in float32 against those in float64, for every layer and group.
void check_phases() {
  for (const Transform transform : {Transform::dft, Transform::dct}) {
    for (const int slices : {1, 2, 3, 48, 144, 199, 200, 1000}) {
      const Groups groups{slices, transform};
      const Sizes sizes{1, slices, 1, 1, 0, 1, transform, 1.0};
      const auto frequencies = definition::frequencies(sizes);
      expect(int64_t(frequencies.size()) == groups.count(), "groups of " + std::to_string(slices) + " slices");
      double worst = 0, worst_float = 0;
      for (int64_t group = 0; group < groups.count(); ++group) {
        for (int64_t layer = 0; layer < slices; ++layer) {
          const definition::Complex exact = definition::factor(sizes, frequencies[group], layer);
          const Phase phase = phase_of(groups, group, layer);
          const PhaseOf<float> single = phase_of<float>(groups, group, layer);
          worst = std::max(worst, std::abs(definition::Complex(phase.re, phase.im) - exact));
          worst_float = std::max(worst_float, std::abs(definition::Complex(single.re, single.im) - exact));
        }
      }
      const double unit = std::sqrt(2.0 / slices);
      const std::string name = "phases of " + std::to_string(slices) + " slices: ";
      expect(worst <= 1e-12 * unit, name + std::to_string(worst));
      expect(worst_float <= 3e-7 * unit, "float32 " + name + std::to_string(worst_float));
    }
  }
}

// The kernel that sizes and addresses lead to.
template <typename scalar>
int rank_of(int c, int r, int64_t core, int64_t a, int64_t b) {
  const auto at = [](int64_t address) { return reinterpret_cast<const void*>(address); };
  const Sizes sizes{5, 4, c, r, 0, 1, Transform::dft, 1.0};
  return with_rank<scalar>(sizes, at(core), at(a), at(b), [](auto rank) { return int(rank); });
}

void check_ranks() {
  for (const int rank : {1, 2, 4, 8, 16}) {
    const std::string name = "the kernel of rank " + std::to_string(rank);
    const int64_t bytes = std::min<int64_t>(16, 4 * rank);
    expect(rank_of<float>(rank, rank, 512, 1024, 2048) == rank, name);
    expect(rank_of<float>(rank, rank, bytes, 3 * bytes, 5 * bytes) == rank, name + ", alignment of a run");
    expect(rank_of<double>(rank, rank, 512, 1024, 2048) == 0, name + " in float64");
    expect(rank_of<float>(rank, rank + 1, 512, 1024, 2048) == 0, name + ", c < r");
    if (rank == 1) continue;
    for (const int odd : {0, 1, 2}) {
      const int64_t shift[] = {odd == 0 ? bytes / 2 : 0, odd == 1 ? bytes / 2 : 0, odd == 2 ? bytes / 2 : 0};
      expect(rank_of<float>(rank, rank, 512 + shift[0], 512 + shift[1], 512 + shift[2]) == 0, name + ", not aligned");
    }
  }
  for (const int rank : {3, 5, 6, 12, 32}) expect(rank_of<float>(rank, rank, 512, 512, 512) == 0, "the general kernel");
}

// Address space for `size` zeros; only pages that are written take memory.
class Reserved {
 public:
  explicit Reserved(int64_t size) : bytes_(size * sizeof(float)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ != MAP_FAILED) madvise(memory_, bytes_, MADV_NOHUGEPAGE);
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() {
    if (memory_ != MAP_FAILED) munmap(memory_, bytes_);
  }
  bool exists() const { return memory_ != MAP_FAILED; }
  float* data() { return static_cast<float*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

// h and p of more than 2^31 numbers, zero but for the last token, which one row of each kernel's blocks meets.
template <int rank>
void check_addresses() {
  const Sizes sizes{700'001, 200, 16, 16, 7, 1, Transform::dft, 1.0}, last{1, 200, 16, 16, 7, 1, Transform::dft, 1.0};
  const std::string name = "rank " + std::to_string(rank) + ", 700001 tokens of 3200: ";
  const int64_t token = 3200, end = (sizes.tokens - 1) * token;
  Guarded<float> core(random_numbers(sizes.core(), 1));
  Guarded<float> h(random_numbers(token, 2)), p(random_numbers(token, 3));
  Reserved input(sizes.tokens * token), output(sizes.tokens * token);
  if (!input.exists() || !output.exists()) {
    std::printf("not checked, no address space: %s\n", name.c_str());
    return;
  }
  const auto last_token = [&](float* from) { return Numbers(from + end, from + end + token); };
  const auto run = [&](auto body, const Grid& grid, int64_t block_y) {
    for (int64_t x = 0; x < grid.blocks_x; ++x) host::run_block(body, grid, x, block_y);
  };

  std::copy_n(h.data(), token, input.data() + end);
  using Forward = MiddleForward<float, rank>;
  Grid grid = Forward::grid(sizes);
  const auto block_of_last = [&](int tokens) { return (sizes.tokens - 1) / (grid.lanes * tokens) % grid.blocks_y; };
  run(Forward{sizes, input.data(), core.data(), output.data()}, grid, block_of_last(Forward::Tiles::tokens));
  expect_close<float>(
      last_token(output.data()), definition::middle_forward(last, h.numbers(), core.numbers()), name + "m");

  std::copy_n(p.data(), token, input.data() + end);
  using Backward = MiddleBackward<float, rank>;
  grid = Backward::grid(sizes);
  run(Backward{sizes, input.data(), core.data(), output.data()}, grid, block_of_last(Backward::Tiles::tokens));
  expect_close<float>(
      last_token(output.data()), definition::middle_backward(last, p.numbers(), core.numbers()), name + "dh");

  std::copy_n(h.data(), token, output.data() + end);
  using Sums = ChunkSums<float, rank>;
  grid = Sums::grid(sizes);
  Guarded<float> sums(core_gradient_workspace(sizes));
  const Sums body{sizes, chunk_tokens(sizes), input.data(), output.data(), sums.data()};
  run(body, grid, grid.blocks_y - 1);
  const float* chunk = sums.data() + (grid.blocks_y - 1) * sizes.core();
  expect_close<float>(
      Numbers(chunk, chunk + sizes.core()), definition::core_gradient(last, p.numbers(), h.numbers()), name + "du");
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  check_phases();
  check_ranks();
  check_few_sizes();
  if (!quick) {
    check_many_sizes();
    check_addresses<0>();
    check_addresses<16>();
  }
  std::printf("%d checks, %d failed, %s half types\n", checks, failures, TCURLORA_HALVES ? "with" : "without");
  return failures == 0 ? 0 : 1;
}
