// Float rows times a weight held in 16 bits, for the ops that have such weights.
#pragma once

#include <optional>

#include "tensors.h"

namespace dynquant {

// W[N, K] in bf16 or fp16, or in fp32 where that is allowed, each row without gaps.
struct HalfWeight {
  Tensor holder;
  Dtype dtype;
  const char* data;
  int64_t n;
  int64_t k;
  int64_t stride;  // elements between rows
};
HalfWeight check_half_weight(const Tensor& weight, const char* name, bool fp32_too = false);

// Rows of floats as half_matmul reads them.
struct FloatMatrix {
  const char* data;
  Dtype dtype;
  int64_t m;
  int64_t stride;  // bytes between rows
};

// out[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n], summed in fp32 in the order that
// half.inl.h specifies and rounded to out_dtype, on as many threads as that is worth. `bias` is
// fp32, one for each row of the weight, or null; rows of `out` are out_stride elements apart.
void half_matmul(const Kernels& kernels, const FloatMatrix& x, const HalfWeight& weight,
                 const float* bias, void* out, Dtype out_dtype, int64_t out_stride);

}  // namespace dynquant
