// What is added to the scores of an attention: masks and position biases.
#pragma once

#include <optional>

#include "../cpu/kernels.h"
#include "../cpu/layout.h"
#include "float_rows.h"
#include "tensors.h"

namespace dynquant {

// What is added to the scores: a tensor of four dimensions that spreads to [B, H, L, S]. bool says
// which keys are attended to: 0 or -Inf.
class Added {
 public:
  Added(const Tensor& given, const char* name, bool may_be_bool, const int64_t (&shape)[4]);
  // Rows in fp32, so many values apart, the same for every sequence and head.
  Added(const float* rows, int64_t stride)
      : data_(reinterpret_cast<const char*>(rows)),
        is_bool_(false),
        strides_{0, 0, stride * bytes_of(Dtype::f32), bytes_of(Dtype::f32)} {}

  const char* row(int64_t b, int64_t h, int64_t i) const {
    return data_ + b * strides_[0] + h * strides_[1] + i * strides_[2];
  }
  bool is_bool() const { return is_bool_; }
  bool is_same_for_rows() const { return strides_[2] == 0; }
  // Behind so many of a bool row's n keys all are hidden, or `least` where that is more.
  int64_t seen(const char* row, int64_t least, int64_t n) const;
  // The row of n values as fp32, filled up to kPartials.
  void widen(const Kernels& kernels, const char* row, int64_t n, float* to) const;

 private:
  std::optional<Tensor> holder_;
  const char* data_;
  bool is_bool_;
  Dtype dtype_ = Dtype::f32;
  int64_t strides_[4];  // in bytes; 0 where it spreads
};

}  // namespace dynquant
