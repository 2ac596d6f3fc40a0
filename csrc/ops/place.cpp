#include "place.h"

#include "tensors.h"

namespace dynquant {

Place current_place() { return {aoti_torch_device_type_cpu(), 0}; }

void check_place(const Tensor& t, const char* name) {
  check(t.is_cpu(), name, " must be on the CPU like the other arguments");
}

}  // namespace dynquant
