// The CUDA kernels for ThreadSanitizer: a thread for each of the GPU's, with the barriers of csrc/cuda/launch.h and no other
// order among them, by the runtime of tests/cpp/stubs. Then blocks against each other, at once. `overlapping` as argument
// runs every block twice at once, which the sanitizer has to report.
#include <cstdio>
#include <string>

#include "../../csrc/cuda/core_gradient.h"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/middle_backward.h"
#include "../../csrc/cuda/middle_forward.h"
#include "definition.h"
#include "expect.h"
#include "run_blocks.h"

namespace {

using namespace tcurlora;
using namespace tcurlora::cuda;

template <class Known>
void check(const Sizes& sizes, bool overlapping) {
  const std::string name = "S=" + std::to_string(sizes.slices) + " c=" + std::to_string(sizes.c) + " r=" +
                           std::to_string(sizes.r) + ": ";
  const int64_t wide = sizes.tokens * sizes.num_slices * sizes.columns(), hidden = sizes.tokens * sizes.hidden();
  Guarded<float> core(random_numbers(sizes.core(), 1)), h(random_numbers(hidden, 2)), p(random_numbers(wide, 3));
  Guarded<float> m(wide), dh(hidden), sums(core_gradient_workspace(sizes)), du(sizes.core());

  using Forward = MiddleForward<float, Known>;
  using Backward = MiddleBackward<float, Known>;
  using Sums = ChunkSums<float, Known>;
  const Forward forward{sizes, h.data(), core.data(), m.data()};
  const Backward backward{sizes, p.data(), core.data(), dh.data()};
  const Sums partial{sizes, Sums::chunk_tokens(sizes), p.data(), h.data(), sums.data()};
  const Grid chunks = Sums::grid(sizes);
  const SumOfChunks<float, float> total{sizes.core(), chunks.blocks_y, sums.data(), du.data()};

  const auto expect_all = [&](const std::string& how) {
    expect_close<float>(
        m.numbers(), definition::middle_forward(sizes, h.numbers(), core.numbers()), name + "m, " + how);
    expect_close<float>(
        dh.numbers(), definition::middle_backward(sizes, p.numbers(), core.numbers()), name + "dh, " + how);
    expect_close<float>(
        du.numbers(), definition::core_gradient(sizes, p.numbers(), h.numbers()), name + "du, " + how);
  };
  expect(launch(forward, Forward::grid(sizes), nullptr) == cudaSuccess, name + "launch of m");
  expect(launch(backward, Backward::grid(sizes), nullptr) == cudaSuccess, name + "launch of dh");
  expect(launch(partial, chunks, nullptr) == cudaSuccess, name + "launch of the chunks");
  expect(launch(total, total.grid(), nullptr) == cudaSuccess, name + "launch of du");
  expect_all("threads at once");

  run_blocks(forward, Forward::grid(sizes), overlapping);
  run_blocks(backward, Backward::grid(sizes), overlapping);
  run_blocks(partial, chunks, overlapping);
  run_blocks(total, total.grid(), overlapping);
  expect_all("blocks at once");
}

}  // namespace

int main(int count, char** arguments) {
  const bool overlapping = count > 1 && std::string(arguments[1]) == "overlapping";
  // 150 tokens are several chunks and several blocks of the streaming kernels; 33 and 65 groups are two blocks and more.
  check<Rank<8>>({150, 64, 8, 8, 3, 2, Transform::dft, 1.0}, overlapping);
  check<Rank<1>>({70, 65, 1, 1, 0, 3, Transform::dct, 1.0}, overlapping);
  check<MultiplesOf<4>>({150, 12, 12, 8, 1, 3, Transform::dft, -0.5}, overlapping);
  check<MultiplesOf<1>>({70, 7, 5, 3, 6, 1, Transform::dft, 1.0}, overlapping);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
