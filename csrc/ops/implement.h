// Registers the ops of ops.h for the device of the library that defines them.
#pragma once

#include "ops.h"

namespace dynquant {

inline void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
  m.impl("choose_qparams", TORCH_BOX(&choose_qparams));
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_with", TORCH_BOX(&quantize_with));
  m.impl("int_mm", TORCH_BOX(&int_mm));
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("scaled_mm", TORCH_BOX(&scaled_mm));
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_dynamic.inference", TORCH_BOX(&linear_dynamic));
}

}  // namespace dynquant
