#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dynquant {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int64_t kWorthACall = 4 << 20;

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kWorthACall) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dynquant
