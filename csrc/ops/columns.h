// What an op gives for each column of its result.
#pragma once

#include <optional>

#include "tensors.h"

namespace dynquant {

// What messages call the parts of a quantized weight.
struct ColumnNames {
  const char* packed = "packed";
  const char* weight_scale = "weight_scale";
  const char* bias = "bias";
};

// The column values of the epilogue, with the tensors that hold them.
struct Columns {
  Tensor weight_scale;
  FloatBias bias;
  EpilogueArgs args = {};

  Columns(const Tensor& scale, const std::optional<Tensor>& given_bias, int64_t n,
          const ColumnNames& names = {})
      : weight_scale(checked(scale, n, names.weight_scale)), bias(given_bias, n, names.bias) {
    args.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
    args.per_channel = scale.size(0) == n;
    args.bias = bias.data;
  }

 private:
  static Tensor checked(const Tensor& scale, int64_t n, const char* name) {
    check_tensor(scale, name, {ScalarType::Float});
    check(scale.dim() == 1 && (scale.size(0) == n || scale.size(0) == 1), name,
          " must have the shape [", n, "] or [1], got ", ShapeOf(scale));
    return dense(scale);
  }
};

}  // namespace dynquant
