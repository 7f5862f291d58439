#include "riding_forward.h"

#include "launch.h"

namespace tcurlora::cuda {

cudaError_t launch_riding_forward(
    Element element, const RidingSizes& sizes, const void* x, const void* h, const void* core, const void* gain,
    const int64_t* columns, void* changed, cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using scalar = typename decltype(type)::type;
    using acc = acc_t<scalar>;
    return with_runs<scalar>(sizes, x, changed, [&](auto runs) {
      using Body = ChangedInput<scalar, decltype(runs)::unit>;
      const Body body{
          sizes, static_cast<const scalar*>(x), static_cast<const scalar*>(h), static_cast<const acc*>(core),
          static_cast<const acc*>(gain), columns, static_cast<scalar*>(changed)};
      return launch(body, Body::grid(sizes), stream);
    });
  });
}

}  // namespace tcurlora::cuda
