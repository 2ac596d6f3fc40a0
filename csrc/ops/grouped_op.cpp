// linear_grouped: the products of linear_dynamic or linear_half, each with the weight of its group.
#include <cstring>

#include "grouped_product.h"
#include "half_matmul.h"
#include "ops.h"

namespace dynquant {
namespace {

void multiply_half(const Kernels& kernels, const GroupedWeights& held, const Rows& rows_of_weights,
                   const Group& group, Dtype dtype) {
  const int64_t k = group.rows.k;
  const char* data = rows_of_weights.data + group.index * held.n * rows_of_weights.stride;
  const HalfWeight weight{rows_of_weights.holder,
                          check_out_dtype(held.weight.scalar_type()),
                          data,
                          held.n,
                          k,
                          rows_of_weights.stride / static_cast<int64_t>(sizeof(uint16_t))};
  half_matmul(kernels, {group.rows.data, dtype, group.rows.m, group.rows.stride}, weight,
              held.bias_of(group.index), group.out, dtype, held.n);
}

}  // namespace

Tensor linear_grouped(const Tensor& x, const Tensor& counts, const Tensor& weight,
                      const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& bias,
                      int64_t n, bool per_token, bool symmetric, int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  const Kernels& kernels = kernels_in_use();
  const Dtype dtype = check_float(x, "x");
  const GroupedWeights held(checked_groups(counts), checked_depth(x), weight, weight_scale, bias,
                            n);
  const std::vector<int64_t> sizes = sizes_of_groups(counts, x.size(0));
  const Rows rows = rows_of(x, "x");
  std::optional<Rows> rows_of_weights;
  if (!held.weight_scale.has_value()) rows_of_weights = rows_of(held.weight, "weight");
  Tensor out = empty({rows.m, n}, x.scalar_type());
  const int64_t out_bytes = static_cast<int64_t>(out.element_size());
  Group group{0, rows, static_cast<char*>(out.mutable_data_ptr())};
  for (int64_t size : sizes) {
    group.rows.m = size;
    if (size > 0 && rows_of_weights.has_value()) {
      multiply_half(kernels, held, *rows_of_weights, group, dtype);
    } else if (size > 0) {
      multiply_packed(kernels, held, group, dtype, out_bytes, scheme);
    }
    ++group.index;
    group.rows.data += size * rows.stride;
    group.out += size * n * out_bytes;
  }
  char* end = static_cast<char*>(out.mutable_data_ptr()) + rows.m * n * out_bytes;
  if (group.out < end) std::memset(group.out, 0, static_cast<size_t>(end - group.out));
  return out;
}

}  // namespace dynquant
