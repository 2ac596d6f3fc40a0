// A packed weight as the ops see it.
#pragma once

#include "../cpu/layout.h"
#include "tensors.h"

namespace dynquant {

// [N, K] of a size that the layout can hold.
inline void check_weight_shape(const Tensor& t, const char* name) {
  check(t.dim() == 2, name, " must have two dimensions [N, K], got ", ShapeOf(t));
  check(t.size(1) <= kMaxK, name, " has K = ", t.size(1), ", more than ", kMaxK,
        ", beyond which int32 sums may overflow");
  check(t.size(0) < kMaxN, name, " has N = ", t.size(0), ", more than ", kMaxN - 1);
}

struct Packed {
  const int8_t* panels;
  int64_t n;
  int64_t k;
};

// The same of the packed weight of `bytes` bytes at `base`; or of one that they begin with.
Packed packed_at(const int8_t* base, int64_t bytes, const char* name, bool has_more = false);

// Reads and checks the header; a tensor that is not a packed weight of this layout is an error.
Packed check_packed(const Tensor& packed, const char* name = "packed");

}  // namespace dynquant
