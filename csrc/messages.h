// Parts of error messages.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>

#include <string>

namespace tcurlora {

// As Python writes them: "(4, 6)", "(6,)", "torch.float32".
inline std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string dtype_text(const at::Tensor& tensor) {
  return "torch." + std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

}  // namespace tcurlora
