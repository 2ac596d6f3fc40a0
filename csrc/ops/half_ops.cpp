// linear_half, and how weights in 16 bits are checked.
#include "half_matmul.h"
#include "ops.h"

namespace dynquant {

HalfWeight check_half_weight(const Tensor& weight, const char* name, bool fp32_too) {
  if (fp32_too) {
    check_float(weight, name);
  } else {
    check_tensor(weight, name, {ScalarType::BFloat16, ScalarType::Half});
  }
  check(weight.dim() == 2, name, " must have two dimensions [N, K], got ", ShapeOf(weight));
  Rows rows = rows_of(weight, name);
  return {rows.holder, check_out_dtype(weight.scalar_type()),
          rows.data,   rows.m,
          rows.k,      rows.stride / static_cast<int64_t>(weight.element_size())};
}

Tensor linear_half(const Tensor& x, const Tensor& half_weight, const std::optional<Tensor>& bias) {
  const Kernels& kernels = kernels_in_use();
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const HalfWeight held = check_half_weight(half_weight, "half_weight");
  check(rows.k == held.k, "x must have K = ", held.k,
        " as its last dimension, as half_weight has, got ", ShapeOf(x));
  const FloatBias added(bias, held.n);
  Tensor out = empty(leading_shape(x, held.n), x.scalar_type());
  half_matmul(kernels, {rows.data, dtype, rows.m, rows.stride}, held, added.data,
              out.mutable_data_ptr(), dtype, held.n);
  return out;
}

}  // namespace dynquant
