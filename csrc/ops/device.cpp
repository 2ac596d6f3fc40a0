#include "device.h"

#include "huge_pages.h"
#include "kept_memory.h"
#include "tensors.h"

namespace dynquant {

Device current_device() { return {aoti_torch_device_type_cpu(), 0}; }

void prepare_allocator() { keep_freed_memory(); }

void prepare_large(void* data, int64_t bytes) { advise_huge_pages(data, bytes); }

void check_device(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU like the other arguments");
}

}  // namespace dynquant
