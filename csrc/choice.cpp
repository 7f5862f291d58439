#include "choice.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <atomic>
#include <utility>

namespace tcurlora {
namespace {

Names known_names;
std::function<Choices(at::Device)> provider;

// Published without a lock: the provider may wait for Python's GIL, which a thread waiting for such a lock might hold.
// Two threads that ask at the same time both get the rules, and one of the two copies is kept.
constexpr size_t kTypes = static_cast<size_t>(at::COMPILE_TIME_MAX_DEVICE_TYPES), kDevices = 64;
std::array<std::array<std::atomic<const Choices*>, kDevices>, kTypes> known{};

Choices without_python(at::Device device) {
  const auto& all = names().backends;
  const size_t native = Names::index(all, kNative);
  Choices choices{{}, std::vector<std::string>(all.size(), "it needs Python")};
#ifdef TCURLORA_CUDA
  const bool works = device.is_cpu() || device.is_cuda();
#else
  const bool works = device.is_cpu();
#endif
  choices.missing[native] = works ? "" : "it has no kernels for this device";
  choices.rules.push_back({native, {}, {0, 0, 0}, {INT64_MAX, INT64_MAX, INT64_MAX}});
  return choices;
}

const Choices& choices_of(at::Device device) {
  auto& slot = known[static_cast<size_t>(device.type())][std::max<int>(device.index(), 0) % kDevices];
  const Choices* choices = slot.load(std::memory_order_acquire);
  if (choices != nullptr) return *choices;
  const Choices* fresh = new Choices(provider ? provider(device) : without_python(device));
  const Choices* expected = nullptr;
  if (slot.compare_exchange_strong(expected, fresh)) return *fresh;
  delete fresh;
  return *expected;
}

}  // namespace

bool Rule::matches(at::ScalarType dtype, const Sizes& sizes) const {
  if (!dtypes.empty() && std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < low[i] || sizes[i] > high[i]) return false;
  }
  return true;
}

// Old tables are not freed: another thread may be reading one.
void set_choices(std::function<Choices(at::Device)> provider_) {
  provider = std::move(provider_);
  for (auto& of_type : known) {
    for (auto& choices : of_type) choices.store(nullptr);
  }
}

const Names& names() { return known_names; }

void set_names(Names names) { known_names = std::move(names); }

size_t choose(std::string_view name, at::Device device, at::ScalarType dtype, const Sizes& sizes) {
  const Choices& choices = choices_of(device);
  const auto& all = names().backends;
  size_t chosen = 0;
  if (name == "auto") {
    const auto rule = std::find_if(
        choices.rules.begin(), choices.rules.end(), [&](const Rule& rule) { return rule.matches(dtype, sizes); });
    TORCH_INTERNAL_ASSERT(rule != choices.rules.end(), "the last rule matches every call");
    chosen = rule->backend;
  } else {
    chosen = Names::index(all, name);
    TORCH_CHECK_VALUE(
        chosen < all.size(), "backend '", name, "' is unknown, expected 'auto' or one of ", c10::Join(", ", all));
  }
  TORCH_CHECK(
      choices.missing[chosen].empty(), "backend '", all[chosen], "' does not work on ", device, ": ",
      choices.missing[chosen], "; use 'auto' or 'eager'");
  return chosen;
}

}  // namespace tcurlora
