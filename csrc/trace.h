// Named ranges around the stages of the operator, so that a profile reads like the maths: user annotations of
// torch.profiler, and NVTX ranges in the domain "tcurlora" where the CUDA toolkit has its header.
// tcurlora_ext/trace.py gives the stages in Python the same names.
#pragma once

#include <ATen/record_function.h>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define TCURLORA_NVTX
#endif

namespace tcurlora {

// A range from here to the end of the block; it takes some nanoseconds where no profiler is active.
class Stage {
 public:
  explicit Stage(const char* name) : range_(at::RecordScope::USER_SCOPE) {
    if (range_.isActive()) range_.before(name);
#ifdef TCURLORA_NVTX
    static const nvtxDomainHandle_t domain = nvtxDomainCreateA("tcurlora");
    domain_ = domain;
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_ASCII;
    event.message.ascii = name;
    nvtxDomainRangePushEx(domain_, &event);
#endif
  }
  ~Stage() {
#ifdef TCURLORA_NVTX
    nvtxDomainRangePop(domain_);
#endif
  }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

 private:
  at::RecordFunction range_;
#ifdef TCURLORA_NVTX
  nvtxDomainHandle_t domain_;
#endif
};

}  // namespace tcurlora
