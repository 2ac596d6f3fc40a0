// The product of one group's rows with its packed weight.
#pragma once

#include "activation.h"
#include "gemm_driver.h"
#include "grouped_weights.h"

namespace dynquant {

// Rows of one group, and where their results go.
struct Group {
  int64_t index;
  Rows rows;
  char* out;
};

inline void multiply_packed(const Kernels& kernels, const GroupedWeights& held, const Group& group,
                            Dtype dtype, int64_t out_bytes, const ActivationScheme& scheme) {
  const int64_t k = group.rows.k, scales = held.weight_scale->size(1);
  const int8_t* packed = static_cast<const int8_t*>(held.weight.const_data_ptr());
  packed += group.index * held.weight.stride(0);
  const Packed weight = packed_at(packed, packed_bytes(held.n, k), "weight");
  check(weight.n == held.n && weight.k == k, "weight of group ", group.index, " has N = ", weight.n,
        " and K = ", weight.k, ", but n is ", held.n, " and its rows have K = ", k);
  const float* scale = static_cast<const float*>(held.weight_scale->const_data_ptr());
  EpilogueArgs epilogue = {};
  epilogue.weight_scale = scale + group.index * scales;
  epilogue.per_channel = scales == held.n;
  epilogue.bias = held.bias_of(group.index);
  epilogue.out = group.out;
  epilogue.out_dtype = dtype;
  epilogue.out_stride = held.n;
  const FloatRows source{kernels, group.rows, dtype, scheme,
                         scheme.whole(kernels, group.rows, dtype)};
  multiply(kernels, source, group.rows.m, weight, epilogue, out_bytes);
}

}  // namespace dynquant
