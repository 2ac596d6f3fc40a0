#include "kept_memory.h"

#include <stdlib.h>
#include <string.h>

namespace dynquant {

#if defined(__GLIBC__)
namespace {

// Freeing a block raises the size up to which glibc reuses memory, but not beyond 32 MiB, its own
// header and rounding to pages included.
constexpr size_t kLargestThreshold = (size_t{32} << 20) - (size_t{8} << 10);

bool raise_threshold() {
  const char* keep = getenv("DYNQUANT_KEEP_MEMORY");
  if (keep != nullptr && strcmp(keep, "0") == 0) return false;
  void* volatile block = malloc(kLargestThreshold);  // else the pair would be optimized away
  free(block);
  return true;
}

}  // namespace

void keep_freed_memory() { [[maybe_unused]] static const bool raised = raise_threshold(); }
#else
void keep_freed_memory() {}
#endif

}  // namespace dynquant
