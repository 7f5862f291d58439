#include "middle_backward.h"

#include "launch.h"
#include "ranks.h"

namespace tcurlora::cuda {

cudaError_t launch_middle_backward(
    Element element, const Sizes& sizes, const void* p, const void* core, void* dh, cudaStream_t stream) {
  return with_element(element, [&](auto type) {
    using scalar = typename decltype(type)::type;
    return with_known<scalar>(sizes, core, p, dh, [&](auto known) {
      using Body = MiddleBackward<scalar, decltype(known)>;
      const Body body{
          sizes, static_cast<const scalar*>(p), static_cast<const acc_t<scalar>*>(core), static_cast<scalar*>(dh)};
      return launch(body, Body::grid(sizes), stream);
    });
  });
}

}  // namespace tcurlora::cuda
