// Ranges over several rows.
#pragma once

#include <algorithm>

#include "../cpu/qparams.h"
#include "tensors.h"

namespace dynquant {

inline Range merge(const Range& a, const Range& b) {
  return {std::min(a.lo, b.lo), std::max(a.hi, b.hi), a.has_nan || b.has_nan};
}

// The range of all rows together, on as many threads as that is worth.
Range range_of_rows(const Kernels& kernels, const Rows& rows, Dtype dtype);

}  // namespace dynquant
