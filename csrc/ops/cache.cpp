#include "cache.h"

#include <unistd.h>

#include <algorithm>

namespace dynquant {

int64_t half_of_l2() {
  constexpr int64_t kUsual = 1024 * 1024, kLeast = 256 * 1024, kMost = 4 * 1024 * 1024;
  static const int64_t half = [=] {
    int64_t bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where it is not known
#endif
    return std::clamp(bytes > 0 ? bytes : kUsual, kLeast, kMost) / 2;
  }();
  return half;
}

}  // namespace dynquant
