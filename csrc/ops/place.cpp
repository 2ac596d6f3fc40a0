#include "place.h"

#include "huge_pages.h"
#include "kept_memory.h"
#include "tensors.h"

namespace dynquant {

Place current_place() { return {aoti_torch_device_type_cpu(), 0}; }

void prepare_allocator() { keep_freed_memory(); }

void prepare_large(void* data, int64_t bytes) { advise_huge_pages(data, bytes); }

void check_place(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU like the other arguments");
}

}  // namespace dynquant
