#include "product_of_groups.h"

namespace dynquant {
namespace {

std::vector<Packed> weights_of(const Tensor& packed, const Tensor& weight_scale, int64_t k) {
  check_tensor(packed, "packed", {ScalarType::Char});
  if (packed.dim() != 2) return {check_packed(packed)};
  const int64_t groups = packed.size(0), n = weight_scale.numel();
  check(groups > 0 && weight_scale.dim() == 1 && n % groups == 0,
        "weight_scale must have one value for each column of the ", groups,
        " groups of packed, got ", ShapeOf(weight_scale));
  const int64_t columns = n / groups, bytes = packed_bytes(columns, k);
  check(packed.size(1) >= bytes && packed.stride(1) == 1, "packed must have the shape [", groups,
        ", ", bytes, " or more], its rows contiguous, for K = ", k, " and ", columns,
        " columns in each group, got ", ShapeOf(packed));
  const int8_t* row = static_cast<const int8_t*>(packed.const_data_ptr());
  std::vector<Packed> weights;
  for (int64_t group = 0; group < groups; ++group, row += packed.stride(0)) {
    weights.push_back(packed_at(row, bytes, "packed"));
    const Packed& weight = weights.back();
    check(weight.n == columns && weight.k == k, "packed must have K = ", k, " and ", columns,
          " columns in each group, got ", weight.k, " and ", weight.n, " in group ", group);
  }
  return weights;
}

}  // namespace

ProductOfGroups::ProductOfGroups(const Tensor& packed, const Tensor& weight_scale,
                                 const std::optional<Tensor>& bias, int64_t k)
    : holder_(packed),
      weights_(weights_of(packed, weight_scale, k)),
      columns_(weight_scale, bias, n()) {}

EpilogueArgs ProductOfGroups::to(int64_t group, float* out, int64_t out_stride) const {
  EpilogueArgs args = columns_.args;
  if (args.per_channel) args.weight_scale += group * columns();
  if (args.bias != nullptr) args.bias += group * columns();
  args.out = out;
  args.out_stride = out_stride;
  args.out_dtype = Dtype::f32;
  return args;
}

}  // namespace dynquant
