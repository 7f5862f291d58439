#include "middle_forward.h"

#include "launch.h"
#include "ranks.h"

namespace tcurlora::cuda {

cudaError_t launch_middle_forward(
    Element element, const Sizes& sizes, const void* h, const void* core, void* m, cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using scalar = typename decltype(type)::type;
    return with_known<scalar>(sizes, core, h, m, [&](auto known) {
      using Body = MiddleForward<scalar, decltype(known)>;
      const Body body{
          sizes, static_cast<const scalar*>(h), static_cast<const acc_t<scalar>*>(core), static_cast<scalar*>(m)};
      return launch(body, Body::grid(sizes), stream);
    });
  });
}

}  // namespace tcurlora::cuda
