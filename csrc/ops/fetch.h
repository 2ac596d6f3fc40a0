// A weight on its way to the L2 cache while its thread still has other work.
#pragma once

#include <algorithm>

#include "../cpu/kernels.h"
#include "packed.h"

namespace dynquant {

// The first panels of a weight, a little at each `some()`. At few rows a product waits for its
// weight, which another layer's weights have driven from the cache since the last call, and the
// work between the products does not use the memory.
class Fetch {
 public:
  // Nothing of any weight.
  Fetch() = default;
  // For a product of so many rows, in so many steps.
  Fetch(const Packed& weight, int64_t rows, int64_t steps) {
    if (rows > kFewRows || steps == 0) return;
    at_ = weight.panels;
    end_ = at_ + std::min(panels_of(weight.n) * panel_bytes(weight.k), kMostBytes);
    step_ = ceil_div(ceil_div(end_ - at_, steps), kLine) * kLine;
  }

  bool is_over() const { return at_ == end_; }
  void some() {
    const int8_t* last = std::min(at_ + std::min(step_, kMostAtOnce), end_);
    for (; at_ < last; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kFewRows = 96;  // with more, waiting for a weight hardly counts
  static constexpr int64_t kMostBytes = 256 * 1024;   // of an L2 cache that holds more than that
  static constexpr int64_t kMostAtOnce = 16 * kLine;  // as many as can be under way

  const int8_t* at_ = nullptr;
  const int8_t* end_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace dynquant
