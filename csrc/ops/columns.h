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
      : bias(given_bias, n, names.bias) {
    check_tensor(scale, names.weight_scale, {ScalarType::Float});
    check(scale.dim() == 1 && (scale.size(0) == n || scale.size(0) == 1), names.weight_scale,
          " must have the shape [", n, "] or [1], got ", ShapeOf(scale));
    weight_scale = scale.is_contiguous() ? scale : torch::stable::contiguous(scale);
    args.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
    args.per_channel = scale.size(0) == n;
    args.bias = bias.data;
  }
};

}  // namespace dynquant
