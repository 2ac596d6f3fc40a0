// How activations are quantized, and ranges over several rows.
#pragma once

#include <algorithm>
#include <optional>

#include "../cpu/qparams.h"
#include "tensors.h"

namespace dynquant {

struct ActivationScheme {
  bool per_token;
  bool symmetric;
  int bits;  // 8 or 16

  // Messages call the number of bits `bits_name`.
  ActivationScheme(bool per_token_, bool symmetric_, int64_t bits_, const char* bits_name)
      : per_token(per_token_), symmetric(symmetric_), bits(static_cast<int>(bits_)) {
    check(bits_ == 8 || bits_ == 16, bits_name, " must be 8 or 16, got ", bits_);
    check(bits_ == 8 || !symmetric, bits_name,
          " = 16 is asymmetric: symmetric activations have 8 bits");
  }

  ScalarType q_type() const {
    return symmetric ? ScalarType::Char : bits == 16 ? ScalarType::UInt16 : ScalarType::Byte;
  }
  QParams choose(const Range& range) const { return choose_qparams(range, symmetric, bits); }
  // What holds for all rows alike, where anything does.
  std::optional<QParams> whole(const Kernels& kernels, const Rows& rows, Dtype dtype) const;
};

inline Range merge(const Range& a, const Range& b) {
  return {std::min(a.lo, b.lo), std::max(a.hi, b.hi), a.has_nan || b.has_nan};
}

// The range of all rows together, on as many threads as that is worth.
Range range_of_rows(const Kernels& kernels, const Rows& rows, Dtype dtype);

}  // namespace dynquant
