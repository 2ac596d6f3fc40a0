// Indices into a table.
#pragma once

#include "tensors.h"

namespace dynquant {

// int64 or int32, each checked to lie in the table.
struct Indices {
  Indices(const Tensor& indices, int64_t rows, const char* name = "indices");
  int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  Tensor holder;
  const void* data;
  bool wide;
  int64_t count;
};

}  // namespace dynquant
