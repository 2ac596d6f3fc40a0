// What the system tells of a core's caches.
#pragma once

#include <stdint.h>
#include <unistd.h>

namespace dynquant {

#if defined(_SC_LEVEL1_DCACHE_SIZE)
constexpr int kL1 = _SC_LEVEL1_DCACHE_SIZE, kL2 = _SC_LEVEL2_CACHE_SIZE;
#else
constexpr int kL1 = -1, kL2 = -1;  // names that no system knows
#endif

namespace {

// How much one holds, or `usual` where the system does not know.
inline int64_t bytes_or(int name, int64_t usual) {
  const int64_t bytes = sysconf(name);
  return bytes > 0 ? bytes : usual;
}

constexpr int64_t kSmallestL1 = 32 * 1024;  // of the processors that have a set of their own

inline int64_t l1_bytes() {
  static const int64_t bytes = bytes_or(kL1, kSmallestL1);
  return bytes;
}

constexpr int64_t kUsualL2 = 1024 * 1024;

inline int64_t l2_bytes() {
  static const int64_t bytes = bytes_or(kL2, kUsualL2);
  return bytes;
}

}  // namespace
}  // namespace dynquant
