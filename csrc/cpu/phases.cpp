#include "phases.h"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace tcurlora::cpu {

const Phase* phases_of(const Groups& groups, int64_t layer) {
  using Key = std::tuple<int64_t, Transform, int64_t>;
  static std::mutex mutex;
  static auto& known = *new std::map<Key, std::vector<Phase>>;  // outlives threads that still compute at exit
  const std::lock_guard<std::mutex> lock(mutex);
  // Inserting into a map does not move its other nodes.
  std::vector<Phase>& phases = known[{groups.slices, groups.transform, layer}];
  if (phases.empty()) {
    for (int64_t group = 0; group < groups.count(); ++group) phases.push_back(phase_of(groups, group, layer));
  }
  return phases.data();
}

}  // namespace tcurlora::cpu
