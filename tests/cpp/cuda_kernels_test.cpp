// The CUDA kernels' own code, run on the CPU and compared with the definition. Needs no GPU and no torch; with the CUDA
// headers on the include path it covers float16 and bfloat16 too. `quick` as argument leaves most sizes out: for builds
// that check every access, which are ten times as slow.
#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

#include "../../csrc/cuda/core_gradient.h"
#include "../../csrc/cuda/middle_backward.h"
#include "../../csrc/cuda/middle_forward.h"
#include "../../csrc/cuda/ranks.h"
#include "definition.h"
#include "expect.h"
#include "reserved.h"
#include "written.h"

namespace {

using namespace tcurlora;
using namespace tcurlora::cuda;
using host::Order;
using host::written;

template <class Known>
std::string name_of() {
  return Known::rank > 0 ? "rank " + std::to_string(Known::rank) : "multiples of " + std::to_string(Known::unit);
}

template <typename scalar, typename result>
void check_sum_of_chunks(
    const Sizes& sizes, Guarded<acc_t<scalar>>& sums, const Numbers& expected, const std::string& what) {
  auto gradient = written<result>(sizes.core(), 0, what, [&](result* to, Order order) {
    const SumOfChunks<acc_t<scalar>, result> body{sizes.core(), sums.size() / sizes.core(), sums.data(), to};
    host::launch(body, body.grid(), order);
  });
  using coarser = std::conditional_t<std::is_same_v<scalar, double> && !std::is_same_v<result, double>, float, scalar>;
  expect_close<coarser, result>(gradient.numbers(), expected, what);
}

// All three operations at one set of sizes, by the kernels for what is known of c and r (tiles.h).
template <typename scalar, class Known>
void check(const Sizes& sizes, int shift = 0) {
  using acc = acc_t<scalar>;
  const std::string name = std::string(type_name<scalar>()) + " " + name_of<Known>() + ", T=" +
                           std::to_string(sizes.tokens) + " S=" + std::to_string(sizes.slices) + " c=" +
                           std::to_string(sizes.c) + " r=" + std::to_string(sizes.r) + " first=" +
                           std::to_string(sizes.first_slice) + " n=" + std::to_string(sizes.num_slices) +
                           (sizes.transform == Transform::dct ? " dct" : " dft") + " shift=" + std::to_string(shift);
  const int64_t wide = sizes.tokens * sizes.num_slices * sizes.columns(), hidden = sizes.tokens * sizes.hidden();
  Guarded<acc> core(random_numbers(sizes.core(), 1), shift);
  Guarded<scalar> h(random_numbers(hidden, 2), shift), p(random_numbers(wide, 3), shift);

  auto m = written<scalar>(wide, shift, name + ": m", [&](scalar* to, Order order) {
    using Body = MiddleForward<scalar, Known>;
    host::launch(Body{sizes, h.data(), core.data(), to}, Body::grid(sizes), order);
  });
  expect_close<scalar>(m.numbers(), definition::middle_forward(sizes, h.numbers(), core.numbers()), name + ": m");

  auto dh = written<scalar>(hidden, shift, name + ": dh", [&](scalar* to, Order order) {
    using Body = MiddleBackward<scalar, Known>;
    host::launch(Body{sizes, p.data(), core.data(), to}, Body::grid(sizes), order);
  });
  expect_close<scalar>(dh.numbers(), definition::middle_backward(sizes, p.numbers(), core.numbers()), name + ": dh");

  using Sums = ChunkSums<scalar, Known>;
  const Grid grid = Sums::grid(sizes);
  auto sums = written<acc>(grid.blocks_y * sizes.core(), 0, name + ": chunks", [&](acc* to, Order order) {
    host::launch(Sums{sizes, Sums::chunk_tokens(sizes), p.data(), h.data(), to}, grid, order);
  });
  expect(sums.size() <= core_gradient_workspace(sizes), name + ": the workspace holds all chunks");
  const Numbers gradient = definition::core_gradient(sizes, p.numbers(), h.numbers());
  check_sum_of_chunks<scalar, float>(sizes, sums, gradient, name + ": du in float32");
  check_sum_of_chunks<scalar, double>(sizes, sums, gradient, name + ": du in float64");
#if TCURLORA_HALVES
  check_sum_of_chunks<scalar, __half>(sizes, sums, gradient, name + ": du in float16");
  check_sum_of_chunks<scalar, __nv_bfloat16>(sizes, sums, gradient, name + ": du in bfloat16");
#endif
}

// By every kernel that these sizes allow where all arrays are aligned.
template <typename scalar>
void check_known(const Sizes& sizes) {
  check<scalar, MultiplesOf<1>>(sizes);
  if (sizes.c % 2 == 0 && sizes.r % 2 == 0) check<scalar, MultiplesOf<2>>(sizes);
  if (sizes.c % 4 == 0 && sizes.r % 4 == 0) check<scalar, MultiplesOf<4>>(sizes);
  if (sizes.c != sizes.r) return;
  if (sizes.r == 1) check<scalar, Rank<1>>(sizes);
  if (sizes.r == 2) check<scalar, Rank<2>>(sizes);
  if (sizes.r == 4) check<scalar, Rank<4>>(sizes);
  if (sizes.r == 8) check<scalar, Rank<8>>(sizes);
  if (sizes.r == 16) check<scalar, Rank<16>>(sizes);
}

// By the kernel that is chosen where all arrays start in the middle of a run: a read as if it were aligned is undefined.
template <typename scalar>
void check_chosen(const Sizes& sizes, int shift) {
  Guarded<acc_t<scalar>> core(1, shift);
  Guarded<scalar> array(1, shift);
  with_known<scalar>(sizes, core.data(), array.data(), array.data(), [&](auto known) {
    check<scalar, decltype(known)>(sizes, shift);
  });
}

void check_all_types(Sizes sizes) {
  for (const Transform transform : {Transform::dft, Transform::dct}) {
    sizes.transform = transform;
    check_known<double>(sizes);
    check_known<float>(sizes);
#if TCURLORA_HALVES
    check_known<__half>(sizes);
    check_known<__nv_bfloat16>(sizes);
#endif
  }
}

void check_alignments() {
  for (const auto& [c, r] : {std::pair{8, 8}, {12, 12}, {12, 8}, {6, 10}, {16, 16}}) {
    for (const int shift : {1, 2, 4}) {
      const Sizes sizes{9, 5, c, r, 1, 2, Transform::dft, 1.0};
      check_chosen<float>(sizes, shift);
#if TCURLORA_HALVES
      check_chosen<__half>(sizes, shift);
      check_chosen<__nv_bfloat16>(sizes, shift);
#endif
    }
  }
}

void check_few_sizes() {
  for (const int rank : {1, 2, 4, 8, 16}) {
    for (const int64_t tokens : {0, 1, 37}) check_all_types({tokens, 4, rank, rank, 1, 2, Transform::dft, -1.7});
  }
  for (const auto& [c, r] : {std::pair{5, 3}, {6, 6}, {10, 4}, {12, 12}, {4, 24}}) {
    check_all_types({19, 5, c, r, 4, 1, Transform::dft, 0.3});
  }
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
  const int odd[][2] = {{1, 2}, {3, 5}, {5, 3}, {7, 1}, {1, 9}, {12, 8}, {8, 12}, {24, 24}, {2, 6}, {33, 20}};
  for (const auto& [c, r] : odd) {
    for (const int slices : {1, 2, 5, 6}) check_all_types({19, slices, c, r, slices - 1, 1, dft, 0.3});
  }
  // Several blocks across, streams of several steps, chunks of more than 64 tokens.
  check_all_types({35, 48, 8, 8, 17, 3, dft, 1.0});
  check_all_types({20, 199, 2, 2, 190, 8, dft, 1.0});
  check_all_types({21, 200, 5, 4, 0, 8, dft, 1.0});
  check<float, Rank<16>>({1400, 199, 16, 16, 40, 1, dft, 1.0});
  check<float, MultiplesOf<1>>({500, 199, 33, 20, 40, 1, dft, 1.0});
  check<float, Rank<4>>({70000, 1, 4, 4, 0, 1, dft, 1.0});
  check<double, MultiplesOf<1>>({40001, 6, 1, 1, 1, 4, dft, 1.0});
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

// The kernel that sizes and addresses lead to, by its name.
template <typename scalar>
std::string kernel_of(int c, int r, int64_t core, int64_t a, int64_t b) {
  const auto at = [](int64_t address) { return reinterpret_cast<const void*>(address); };
  const Sizes sizes{5, 4, c, r, 0, 1, Transform::dft, 1.0};
  return with_known<scalar>(sizes, at(core), at(a), at(b), [](auto known) { return name_of<decltype(known)>(); });
}

void check_choice() {
  const std::string any = "multiples of 1", twos = "multiples of 2", fours = "multiples of 4";
  const std::string below[] = {any, any, twos, fours, fours};
  const int ranks[] = {1, 2, 4, 8, 16};
  for (int i = 0; i < 5; ++i) {
    const int rank = ranks[i];
    const std::string name = "rank " + std::to_string(rank);
    const int64_t bytes = std::min<int64_t>(16, 2 * rank);
    expect(kernel_of<float>(rank, rank, 512, 1024, 2048) == name, "the kernel of " + name);
    // Elements of 2 bytes, a run of them after another; the core is of 4 bytes each.
    expect(kernel_of<int16_t>(rank, rank, 512, 3 * bytes, 5 * bytes) == name, name + ", alignment of a run");
    expect(kernel_of<double>(rank, rank, 512, 1024, 2048) == any, name + " in float64");
    expect(kernel_of<float>(rank, rank + 1, 512, 1024, 2048) == any, name + ", c < r");
    if (rank == 1) continue;
    for (const int odd : {0, 1}) {
      const int64_t shift[] = {odd == 0 ? bytes / 2 : 0, odd == 1 ? bytes / 2 : 0};
      expect(kernel_of<int16_t>(rank, rank, 512, 512 + shift[0], 512 + shift[1]) == below[i], name + ", half a run off");
    }
    expect(kernel_of<float>(rank, rank, 512 + 4, 512, 512) == any, name + ", the core one element off");
  }
  for (const auto& [c, r] : {std::pair{12, 12}, {24, 24}, {32, 32}, {8, 4}, {4, 12}}) {
    expect(kernel_of<float>(c, r, 16, 32, 48) == fours, "whole tiles");
    expect(kernel_of<int16_t>(c, r, 16, 8, 24) == fours, "whole tiles, runs of 8 bytes");
    expect(kernel_of<int16_t>(c, r, 16, 8, 20) == twos, "whole tiles, aligned to 4 bytes");
    expect(kernel_of<int16_t>(c, r, 16, 8, 2) == any, "whole tiles, aligned to an element");
    expect(kernel_of<double>(c, r, 16, 32, 48) == any, "whole tiles in float64");
  }
  for (const auto& [c, r] : {std::pair{6, 6}, {10, 4}, {12, 2}}) {
    expect(kernel_of<float>(c, r, 8, 16, 24) == twos, "even sizes");
    expect(kernel_of<float>(c, r, 8, 12, 24) == any, "even sizes, not aligned");
  }
  for (const auto& [c, r] : {std::pair{3, 3}, {5, 12}, {12, 7}}) {
    expect(kernel_of<float>(c, r, 16, 16, 16) == any, "the general kernel");
  }
}

// Chunks of the core's gradient against what sizes.h promises.
template <class Known>
void check_chunks(const Sizes& sizes) {
  using Sums = ChunkSums<float, Known>;
  const Grid grid = Sums::grid(sizes);
  const int64_t chunk = Sums::chunk_tokens(sizes), step = int64_t(grid.lanes) * Sums::Tiles::tokens;
  const std::string name = name_of<Known>() + ", chunks of " + std::to_string(sizes.tokens) + " tokens: ";
  expect(chunk >= 64 && chunk % step == 0, name + std::to_string(chunk) + " tokens in steps of " + std::to_string(step));
  expect(grid.blocks_y == (sizes.tokens + chunk - 1) / chunk && grid.blocks_y <= 512, name + "their number");
  expect(grid.blocks_y * sizes.core() <= 1 << 20 || grid.blocks_y == 1, name + "their sums");
}

void check_all_chunks() {
  for (const int64_t tokens : {1, 63, 64, 65, 2048, 8192, 32768, 1 << 20}) {
    for (const int slices : {1, 2, 12, 48, 64, 199}) {
      const auto with = [&](int c, int r) { return Sizes{tokens, slices, c, r, 0, 1, Transform::dft, 1.0}; };
      check_chunks<Rank<1>>(with(1, 1));
      check_chunks<Rank<4>>(with(4, 4));
      check_chunks<Rank<8>>(with(8, 8));
      check_chunks<Rank<16>>(with(16, 16));
      check_chunks<MultiplesOf<4>>(with(12, 24));
      check_chunks<MultiplesOf<1>>(with(33, 20));
    }
  }
  // By hand: 33 groups in two blocks of 17, so 7 lanes of 4 tokens each; 84 is the first multiple of 28 from 64 on.
  using Sums = ChunkSums<float, Rank<4>>;
  const Sizes sizes{8192, 64, 4, 4, 0, 1, Transform::dft, 1.0};
  expect(Sums::chunk_tokens(sizes) == 84 && Sums::grid(sizes).blocks_y == 98, "98 chunks of 84 tokens for S = 64, r = 4");
}

// h and p of more than 2^31 numbers, zero but for the last token, which one row of each kernel's blocks meets.
template <class Known>
void check_addresses() {
  const Sizes sizes{700'001, 200, 16, 16, 7, 1, Transform::dft, 1.0}, last{1, 200, 16, 16, 7, 1, Transform::dft, 1.0};
  const std::string name = name_of<Known>() + ", 700001 tokens of 3200: ";
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
  using Forward = MiddleForward<float, Known>;
  Grid grid = Forward::grid(sizes);
  const auto block_of_last = [&](int tokens) { return (sizes.tokens - 1) / (grid.lanes * tokens) % grid.blocks_y; };
  run(Forward{sizes, input.data(), core.data(), output.data()}, grid, block_of_last(Forward::Tiles::tokens));
  expect_close<float>(
      last_token(output.data()), definition::middle_forward(last, h.numbers(), core.numbers()), name + "m");

  std::copy_n(p.data(), token, input.data() + end);
  using Backward = MiddleBackward<float, Known>;
  grid = Backward::grid(sizes);
  run(Backward{sizes, input.data(), core.data(), output.data()}, grid, block_of_last(Backward::Tiles::tokens));
  expect_close<float>(
      last_token(output.data()), definition::middle_backward(last, p.numbers(), core.numbers()), name + "dh");

  std::copy_n(h.data(), token, output.data() + end);
  using Sums = ChunkSums<float, Known>;
  grid = Sums::grid(sizes);
  Guarded<float> sums(core_gradient_workspace(sizes));
  const Sums body{sizes, Sums::chunk_tokens(sizes), input.data(), output.data(), sums.data()};
  run(body, grid, grid.blocks_y - 1);
  const float* chunk = sums.data() + (grid.blocks_y - 1) * sizes.core();
  expect_close<float>(
      Numbers(chunk, chunk + sizes.core()), definition::core_gradient(last, p.numbers(), h.numbers()), name + "du");
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  check_phases();
  check_choice();
  check_all_chunks();
  check_few_sizes();
  check_alignments();
  if (!quick) {
    check_many_sizes();
    check_addresses<MultiplesOf<4>>();
    check_addresses<Rank<16>>();
  }
  std::printf("%d checks, %d failed, %s half types\n", checks, failures, TCURLORA_HALVES ? "with" : "without");
  return failures == 0 ? 0 : 1;
}
