#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dynquant {

#if defined(MADV_HUGEPAGE)
namespace {

constexpr uintptr_t kPage = 4096;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int64_t kWorthACall = 4 << 20;

uintptr_t up(uintptr_t address, uintptr_t page) { return (address + page - 1) & ~(page - 1); }

uintptr_t down(uintptr_t address, uintptr_t page) { return address & ~(page - 1); }

void advise(uintptr_t begin, uintptr_t end, int advice) {
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
  if (bytes < kWorthACall) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t inner = up(begin, kHugePage), outer = down(end, kHugePage);
  advise(inner, outer, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  // A call for all of them costs less than a fault for each.
  advise(up(begin, kPage), inner, MADV_POPULATE_WRITE);
  advise(outer, down(end, kPage), MADV_POPULATE_WRITE);
#endif
}
#else
void advise_huge_pages(void*, int64_t) {}
#endif

}  // namespace dynquant
