// The riding form's CUDA kernels, their own code run on the CPU and compared with the definition (csrc/riding/riding.h).
// As cuda_kernels_test.cpp: no GPU and no torch, with 16-bit types where the CUDA headers are; `quick` leaves out most.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/core_gradient.h"
#include "../../csrc/cuda/riding_backward.h"
#include "../../csrc/cuda/riding_forward.h"
#include "reserved.h"
#include "riding_definition.h"
#include "written.h"

namespace {

using namespace tcurlora;
using namespace tcurlora::cuda;
using host::Order;
using host::written;

std::string name_of(const RidingSizes& sizes) {
  return "T=" + std::to_string(sizes.tokens) + " in=" + std::to_string(sizes.features) + " step=" +
         std::to_string(sizes.step) + " c=" + std::to_string(sizes.c) + " r=" + std::to_string(sizes.r);
}

// All three kernels at one set of sizes; rows are copied in runs of `unit`.
template <typename scalar, int unit>
void check(const RidingSizes& sizes, const std::vector<int64_t>& columns, int shift) {
  using acc = acc_t<scalar>;
  const std::string name = std::string(type_name<scalar>()) + " runs of " + std::to_string(unit) + ", " +
                           name_of(sizes) + " shift=" + std::to_string(shift);
  const int64_t wide = sizes.tokens * sizes.step, hidden = sizes.tokens * sizes.r, entries = int64_t(sizes.c) * sizes.r;
  Guarded<scalar> x(random_numbers(wide, 1), shift), h(random_numbers(hidden, 2), shift);
  Guarded<acc> core(random_numbers(entries, 3)), gain(random_numbers(sizes.c, 4));
  const definition::Riding exact{sizes, columns, gain.numbers(), core.numbers()};

  auto changed = written<scalar>(sizes.tokens * sizes.features, shift, name + ": x'", [&](scalar* to, Order order) {
    using Body = ChangedInput<scalar, unit>;
    host::launch(
        Body{sizes, x.data(), h.data(), core.data(), gain.data(), columns.data(), to}, Body::grid(sizes), order);
  });
  expect_close<scalar>(changed.numbers(), exact.changed(x.numbers(), h.numbers()), name + ": x'");

  auto dh = written<scalar>(hidden, shift, name + ": dh", [&](scalar* to, Order order) {
    using Body = HiddenGradient<scalar>;
    const Body body{sizes, Body::block_tokens(sizes), x.data(), core.data(), gain.data(), columns.data(), to};
    host::launch(body, Body::grid(sizes), order);
  });
  expect_close<scalar>(dh.numbers(), exact.hidden_gradient(x.numbers()), name + ": dh");

  using Sums = ChangeSums<scalar>;
  const Grid grid = Sums::grid(sizes);
  auto sums = written<acc>(grid.blocks_y * entries, 0, name + ": chunks", [&](acc* to, Order order) {
    const Sums body{sizes, Sums::chunk_tokens(sizes), x.data(), h.data(), gain.data(), columns.data(), to};
    host::launch(body, grid, order);
  });
  expect(sums.size() <= core_gradient_workspace(sizes.one_slice()), name + ": the workspace holds all chunks");
  auto gradient = written<acc>(entries, 0, name + ": dcore", [&](acc* to, Order order) {
    const SumOfChunks<acc, acc> body{entries, grid.blocks_y, sums.data(), to};
    host::launch(body, body.grid(), order);
  });
  expect_close<scalar, acc>(gradient.numbers(), exact.core_gradient(x.numbers(), h.numbers()), name + ": dcore");
}

// c of the features, far from each other and in no order.
std::vector<int64_t> some_columns(const RidingSizes& sizes) {
  std::vector<int64_t> columns(sizes.features);
  std::iota(columns.begin(), columns.end(), 0);
  std::shuffle(columns.begin(), columns.end(), std::mt19937(5));
  columns.resize(sizes.c);
  return columns;
}

// By the kernel that is chosen for addresses `shift` elements after an aligned one, and by single elements.
template <typename scalar>
void check_type(const RidingSizes& sizes, const std::vector<int64_t>& columns) {
  for (const int shift : {0, 1}) {
    Guarded<scalar> array(1, shift);
    with_runs<scalar>(sizes, array.data(), array.data(), [&](auto runs) {
      check<scalar, decltype(runs)::unit>(sizes, columns, shift);
    });
  }
  check<scalar, 1>(sizes, columns, 0);
}

void check_types(const RidingSizes& sizes, const std::vector<int64_t>& columns) {
  check_type<float>(sizes, columns);
  check_type<double>(sizes, columns);
#if TCURLORA_HALVES
  check_type<__half>(sizes, columns);
  check_type<__nv_bfloat16>(sizes, columns);
#endif
}
void check_types(const RidingSizes& sizes) { check_types(sizes, some_columns(sizes)); }

// The length of the runs that rows are copied in, by sizes and addresses.
template <typename scalar>
int runs_of(int64_t features, int64_t step, int64_t x, int64_t changed) {
  const auto at = [](int64_t address) { return reinterpret_cast<const void*>(address); };
  return with_runs<scalar>({5, features, step, 1, 1, 1.0}, at(x), at(changed), [](auto runs) { return runs.unit; });
}

void check_choice() {
  expect(runs_of<float>(8, 8, 16, 32) == 4 && runs_of<double>(8, 8, 16, 32) == 2, "runs of 16 bytes");
  expect(runs_of<int16_t>(16, 24, 16, 32) == 8, "runs of 16 bytes of 2-byte elements");
  expect(runs_of<int16_t>(16, 16, 8, 32) == 1 && runs_of<int16_t>(16, 16, 16, 40) == 1, "an address that is not aligned");
  expect(runs_of<int16_t>(12, 16, 16, 32) == 1 && runs_of<int16_t>(16, 20, 16, 32) == 1, "a row that is not aligned");
}

// The last token of an x of more than 2^31 elements, in the block that has it.
void check_addresses() {
  const int64_t features = 4096;
  const RidingSizes sizes{600'001, features, features, 3, 2, 1.0}, last{1, features, features, 3, 2, 1.0};
  const int64_t end = (sizes.tokens - 1) * features;
  const std::vector<int64_t> columns{7, 4095, 0};
  const Numbers row = random_numbers(features, 1), hidden = random_numbers(2, 2);
  Guarded<float> core(random_numbers(6, 3)), gain(random_numbers(3, 4)), h(Numbers(2 * sizes.tokens, 0.0));
  Reserved x(sizes.tokens * features), changed(sizes.tokens * features);
  if (!x.exists() || !changed.exists()) {
    std::printf("not checked, no address space: x of more than 2^31 elements\n");
    return;
  }
  const auto narrow = [](double value) { return static_cast<float>(value); };
  std::transform(row.begin(), row.end(), x.data() + end, narrow);
  std::transform(hidden.begin(), hidden.end(), h.data() + 2 * (sizes.tokens - 1), narrow);
  const Numbers own_x(x.data() + end, x.data() + end + features);
  const Numbers own_h(h.data() + 2 * (sizes.tokens - 1), h.data() + 2 * sizes.tokens);
  const definition::Riding exact{last, columns, gain.numbers(), core.numbers()};

  using Forward = ChangedInput<float, 4>;
  const Grid grid = Forward::grid(sizes);
  host::run_block(
      Forward{sizes, x.data(), h.data(), core.data(), gain.data(), columns.data(), changed.data()}, grid,
      grid.blocks_x - 1, 0);
  const Numbers found(changed.data() + end, changed.data() + end + features);
  expect_close<float>(found, exact.changed(own_x, own_h), "x' beyond 2^31 elements");

  using Backward = HiddenGradient<float>;
  Guarded<float> dh(2 * sizes.tokens);
  const Backward backward{
      sizes, Backward::block_tokens(sizes), x.data(), core.data(), gain.data(), columns.data(), dh.data()};
  host::run_block(backward, Backward::grid(sizes), Backward::grid(sizes).blocks_x - 1, 0);
  const float* own = dh.data() + 2 * (sizes.tokens - 1);
  expect_close<float>(Numbers(own, own + 2), exact.hidden_gradient(own_x), "dh beyond 2^31 elements");
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && std::string(arguments[1]) == "quick";
  check_choice();
  check_types({0, 8, 8, 2, 3, 1.0});
  check_types({1, 1, 1, 1, 1, -2.0});
  check_types({37, 24, 32, 8, 8, 0.7});            // rows apart, aligned
  check_types({19, 23, 23, 5, 3, 0.3});            // rows that are not aligned
  check_types({5, 16, 16, 4, 2, 1.0}, {3, -1, 16, 0});  // columns that x does not have are left out
  if (!quick) {
    check_types({67, 4104, 4104, 16, 16, 1.0});  // more than one round of a block's threads
    check_types({130, 80, 80, 64, 48, 1.0});
    check_types({5, 80, 81, 33, 65, 1.0});
    check_types({700, 16, 16, 2, 130, 1.0});  // several blocks across, several chunks
    check_types({3, 1000, 1000, 900, 2, 1.0});  // fewer tokens in a block
    check<float, 4>({40'000, 8, 8, 3, 2, 1.0}, {5, 0, 2}, 0);  // chunks of more than 64 tokens
    check_addresses();
  }
  std::printf("%d checks, %d failed, %s half types\n", checks, failures, TCURLORA_HALVES ? "with" : "without");
  return failures == 0 ? 0 : 1;
}
