// A packed weight in device memory: the host knows its length, kernels look at its header.
#pragma once

#include "packed.h"

namespace dynquant {

struct CudaPacked {
  Tensor holder;  // starts at a multiple of 16 bytes
  const int8_t* data;
  int64_t n;
  int64_t k;
};

// A weight of that K, whose N follows from its length. `name` is the argument that K comes from.
CudaPacked packed_of_depth(const Tensor& packed, int64_t k, const char* name);

}  // namespace dynquant
