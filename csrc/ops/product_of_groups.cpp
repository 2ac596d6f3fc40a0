#include "product_of_groups.h"

namespace dynquant {
namespace {

std::vector<Packed> weights_of(const Tensor& packed) {
  check_tensor(packed, "packed", {ScalarType::Char});
  if (packed.dim() != 2) return {check_packed(packed)};
  const int64_t groups = packed.size(0);
  check(groups > 0, "packed must have a row for each group, got ", ShapeOf(packed));
  check(packed.stride(1) == 1, "packed must have contiguous rows, got strides of ",
        packed.stride(0), " and ", packed.stride(1));
  const int8_t* row = static_cast<const int8_t*>(packed.const_data_ptr());
  std::vector<Packed> weights;
  for (int64_t group = 0; group < groups; ++group, row += packed.stride(0)) {
    weights.push_back(packed_at(row, packed.size(1), "packed", true));
    const Packed &first = weights.front(), &own = weights.back();
    check(own.n == first.n && own.k == first.k,
          "packed must have groups of one size, got N = ", own.n, " and K = ", own.k, " in group ",
          group, " and ", first.n, " and ", first.k, " in the first");
  }
  return weights;
}

const Tensor& checked(const Tensor& weight_scale, int64_t groups, int64_t n) {
  check(groups == 1 || (weight_scale.dim() == 1 && weight_scale.size(0) == n),
        "weight_scale must have one value for each of the ", n, " columns of ", groups,
        " groups, got ", ShapeOf(weight_scale));
  return weight_scale;
}

}  // namespace

ProductOfGroups::ProductOfGroups(const Tensor& packed, const Tensor& weight_scale,
                                 const std::optional<Tensor>& bias)
    : holder_(packed),
      weights_(weights_of(packed)),
      columns_(checked(weight_scale, groups(), n()), bias, n()) {}

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
