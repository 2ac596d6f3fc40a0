// A packed weight as the ops see it.
#pragma once

#include "../cpu/layout.h"
#include "tensors.h"

namespace dynquant {

struct Packed {
  const int8_t* panels;
  int64_t n;
  int64_t k;
};

// Reads and checks the header; a tensor that is not a packed weight of this layout is an error.
Packed check_packed(const Tensor& packed, const char* name = "packed");

}  // namespace dynquant
