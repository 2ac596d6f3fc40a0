// What an op gives for each column of its result.
#pragma once

#include "tensors.h"

namespace dynquant {

// The column values of the epilogue, with the tensors that hold them.
struct Columns {
  Tensor weight_scale;
  std::optional<Tensor> bias;
  EpilogueArgs args = {};

  Columns(const Tensor& scale, const std::optional<Tensor>& given_bias, int64_t n) {
    check_tensor(scale, "weight_scale", {ScalarType::Float});
    check(scale.dim() == 1 && (scale.size(0) == n || scale.size(0) == 1),
          "weight_scale must have the shape [", n, "] or [1], got ", ShapeOf(scale));
    weight_scale = scale.is_contiguous() ? scale : torch::stable::contiguous(scale);
    args.weight_scale = static_cast<const float*>(weight_scale.const_data_ptr());
    args.per_channel = scale.size(0) == n;
    if (!given_bias.has_value()) return;
    const Dtype dtype = check_float(*given_bias, "bias");
    check(given_bias->dim() == 1 && given_bias->size(0) == n, "bias must have the shape [", n,
          "], got ", ShapeOf(*given_bias));
    bias = *given_bias;
    if (dtype != Dtype::f32) bias = torch::stable::to(*bias, ScalarType::Float);
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    args.bias = static_cast<const float*>(bias->const_data_ptr());
  }
};

}  // namespace dynquant
