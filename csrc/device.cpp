#include "device.h"

namespace tcurlora {

bool on_gpu(const at::Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace tcurlora
