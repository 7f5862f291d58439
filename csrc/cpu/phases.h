// The phases of a layer, computed once: sines and cosines cost more than the rest of a call on few tokens.
#pragma once

#include "../middle.h"

namespace tcurlora::cpu {

// phase_of(groups, 0..count, layer), kept until the process ends: 16 bytes per group, 400 per slice of UNETR's qkv.
const Phase* phases_of(const Groups& groups, int64_t layer);

}  // namespace tcurlora::cpu
