#include "cache.h"

#include <algorithm>

#include "../cpu/cache_bytes.h"

namespace dynquant {

int64_t half_of_l2() {
  constexpr int64_t kLeast = 256 * 1024, kMost = 4 * 1024 * 1024;
  static const int64_t half = std::clamp(l2_bytes(), kLeast, kMost) / 2;
  return half;
}

}  // namespace dynquant
