// What a launch writes, in both orders of its threads and blocks.
#pragma once

#include <string>

#include "expect.h"
#include "host_launch.h"

namespace tcurlora::cuda::host {

// Runs a launch in both orders into poisoned arrays; the one returned was written in the usual order.
template <typename scalar, typename Launch>
Guarded<scalar> written(int64_t size, int shift, const std::string& what, const Launch& launch) {
  Guarded<scalar> output(size, shift), reversed(size, shift);
  launch(output.data(), Order::forwards);
  launch(reversed.data(), Order::backwards);
  expect(output.guards_untouched(), what + ": wrote outside its output");
  expect(output.same_bits(reversed), what + ": depends on the order of threads or blocks");
  return output;
}

}  // namespace tcurlora::cuda::host
