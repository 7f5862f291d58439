// Memory for tensors of more than 2^31 elements, of which a test touches a few.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace tcurlora::cuda {

// Address space for `size` zeros; only pages that are written take memory.
class Reserved {
 public:
  explicit Reserved(int64_t size) : bytes_(size * sizeof(float)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ != MAP_FAILED) madvise(memory_, bytes_, MADV_NOHUGEPAGE);
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() {
    if (memory_ != MAP_FAILED) munmap(memory_, bytes_);
  }
  bool exists() const { return memory_ != MAP_FAILED; }
  float* data() { return static_cast<float*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

}  // namespace tcurlora::cuda
