// The registered riding operators as C++ types.
#pragma once

#include "riding.h"

namespace tcurlora {

#define TCURLORA_BACKEND c10::string_view backend
#define TCURLORA_RIDING \
  const Tensor &x, const Tensor &weight, const OptionalTensor &bias, TCURLORA_RIDING_ADAPTER, TCURLORA_BACKEND
#define TCURLORA_RIDING_NAMES x, weight, bias, TCURLORA_RIDING_ADAPTER_NAMES, backend
#define TCURLORA_RIDING_BACKWARD                                                                                       \
  const Tensor &g, const OptionalTensor &x, const OptionalTensor &h, const Tensor &weight, TCURLORA_RIDING_ADAPTER, \
      RidingNeeds needs, TCURLORA_BACKEND
#define TCURLORA_RIDING_BACKWARD_NAMES g, x, h, weight, TCURLORA_RIDING_ADAPTER_NAMES, needs, backend
#define TCURLORA_RIDE const Tensor &x, TCURLORA_RIDING_ADAPTER, TCURLORA_BACKEND
#define TCURLORA_RIDE_NAMES x, TCURLORA_RIDING_ADAPTER_NAMES, backend
#define TCURLORA_RIDE_BACKWARD                                                                                 \
  const Tensor &g, const OptionalTensor &x, const OptionalTensor &h, TCURLORA_RIDING_ADAPTER, RideNeeds needs, \
      TCURLORA_BACKEND
#define TCURLORA_RIDE_BACKWARD_NAMES g, x, h, TCURLORA_RIDING_ADAPTER_NAMES, needs, backend

using RidingNeeds = std::array<bool, 4>;                              // x, bias, core, row
using RidingGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of the same
using RideGradients = std::tuple<Tensor, Tensor, Tensor>;            // of x, core, row

using RidingType = Tensor(TCURLORA_RIDING);
using RidingForwardType = std::tuple<Tensor, Tensor>(TCURLORA_RIDING);
using RidingBackwardType = RidingGradients(TCURLORA_RIDING_BACKWARD);
using RideType = Tensor(TCURLORA_RIDE);
using RideForwardType = std::tuple<Tensor, Tensor>(TCURLORA_RIDE);
using RideBackwardType = RideGradients(TCURLORA_RIDE_BACKWARD);

// An operator through the dispatcher; looked up once for each name and type.
#define TCURLORA_OPERATOR(function, name, Type)                                                              \
  inline const c10::TypedOperatorHandle<Type>& function() {                                                  \
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("tcurlora::" name, "").typed<Type>(); \
    return op;                                                                                               \
  }
TCURLORA_OPERATOR(riding_operator, "riding", RidingType)
TCURLORA_OPERATOR(riding_forward_operator, "riding_forward", RidingForwardType)
TCURLORA_OPERATOR(riding_backward_operator, "riding_backward", RidingBackwardType)
TCURLORA_OPERATOR(ride_operator, "ride", RideType)
TCURLORA_OPERATOR(ride_forward_operator, "ride_forward", RideForwardType)
TCURLORA_OPERATOR(ride_backward_operator, "ride_backward", RideBackwardType)
#undef TCURLORA_OPERATOR

}  // namespace tcurlora
