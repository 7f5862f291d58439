// The riding form's CUDA kernels for ThreadSanitizer, as cuda_races_test.cpp. A number as argument chooses one kernel.
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/riding_backward.h"
#include "../../csrc/cuda/riding_forward.h"
#include "expect.h"
#include "riding_definition.h"
#include "run_blocks.h"

namespace {

using namespace tcurlora;
using namespace tcurlora::cuda;

template <int unit>
void check(const RidingSizes& sizes, const std::vector<int64_t>& columns, int chosen) {
  const std::string name = "c=" + std::to_string(sizes.c) + " r=" + std::to_string(sizes.r) + ": ";
  const int64_t hidden = sizes.tokens * sizes.r, entries = int64_t(sizes.c) * sizes.r;
  Guarded<float> x(random_numbers(sizes.tokens * sizes.step, 1)), h(random_numbers(hidden, 2));
  Guarded<float> core(random_numbers(entries, 3)), gain(random_numbers(sizes.c, 4));
  Guarded<float> changed(sizes.tokens * sizes.features), dh(hidden);
  const definition::Riding exact{sizes, columns, gain.numbers(), core.numbers()};

  using Forward = ChangedInput<float, unit>;
  using Backward = HiddenGradient<float>;
  using Sums = ChangeSums<float>;
  const Grid chunks = Sums::grid(sizes);
  Guarded<float> sums(chunks.blocks_y * entries);
  const auto all = [&](const std::string& how, const auto& run) {
    if (chosen < 0 || chosen == 0) {
      run(Forward{sizes, x.data(), h.data(), core.data(), gain.data(), columns.data(), changed.data()},
          Forward::grid(sizes));
      expect_close<float>(changed.numbers(), exact.changed(x.numbers(), h.numbers()), name + "x', " + how);
    }
    if (chosen < 0 || chosen == 1) {
      run(Backward{sizes, Backward::block_tokens(sizes), x.data(), core.data(), gain.data(), columns.data(), dh.data()},
          Backward::grid(sizes));
      expect_close<float>(dh.numbers(), exact.hidden_gradient(x.numbers()), name + "dh, " + how);
    }
    if (chosen < 0 || chosen == 2) {
      run(Sums{sizes, Sums::chunk_tokens(sizes), x.data(), h.data(), gain.data(), columns.data(), sums.data()}, chunks);
      Numbers total(entries, 0.0), partial = sums.numbers();
      for (size_t i = 0; i < partial.size(); ++i) total[i % entries] += partial[i];
      expect_close<float>(total, exact.core_gradient(x.numbers(), h.numbers()), name + "dcore, " + how);
    }
  };
  all("threads at once", [&](const auto& body, const Grid& grid) {
    expect(launch(body, grid, nullptr) == cudaSuccess, name + "launch");
  });
  all("blocks at once", [](const auto& body, const Grid& grid) { run_blocks(body, grid, false); });
}

}  // namespace

int main(int count, char** arguments) {
  const int chosen = count > 1 ? std::stoi(arguments[1]) : -1;
  check<4>({70, 40, 40, 8, 8, 1.0}, {3, 39, 0, 17, 8, 21, 5, 30}, chosen);
  check<1>({67, 9, 11, 3, 5, -0.5}, {8, 0, 4}, chosen);
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
