#include "layer_product.h"

#include "gemm_driver.h"

namespace dynquant {

LayerProduct::LayerProduct(const Tensor& packed, const Tensor& scale,
                           const std::optional<Tensor>& bias, const ActivationScheme& scheme,
                           const ColumnNames& names)
    : name_(names.packed), held_([&] {
        Packed weight = check_packed(packed, names.packed);
        Columns columns(scale, bias, weight.n, names);
        columns.args.out_dtype = Dtype::f32;
        columns.args.out_stride = weight.n;
        return Int8{std::move(weight), std::move(columns), scheme};
      }()) {}

LayerProduct::LayerProduct(const Tensor& weight, const std::optional<Tensor>& bias, bool fp32_too,
                           const ColumnNames& names)
    : name_(names.packed), held_([&] {
        HalfWeight held = check_half_weight(weight, names.packed, fp32_too);
        FloatBias added(bias, held.n, names.bias);
        return Float{std::move(held), std::move(added)};
      }()) {}

int64_t LayerProduct::n() const {
  return std::visit([](const auto& held) { return held.weight.n; }, held_);
}

int64_t LayerProduct::k() const {
  return std::visit([](const auto& held) { return held.weight.k; }, held_);
}

double LayerProduct::nanoseconds(const Kernels& kernels, int64_t rows) const {
  const bool is_int8 = std::holds_alternative<Int8>(held_);
  const Costs& costs = is_int8 ? product_for(kernels, rows, n(), k()).costs : kernels.half_costs;
  return product_nanoseconds(rows, n(), k(), costs);
}

std::optional<QParams> LayerProduct::whole(const Kernels& kernels, const Rows& rows,
                                           Dtype dtype) const {
  const Int8* int8 = std::get_if<Int8>(&held_);
  if (int8 == nullptr) return std::nullopt;
  return int8->scheme.whole(kernels, rows, dtype);
}

void LayerProduct::multiply(const Kernels& kernels, const Rows& rows, Dtype dtype,
                            const std::optional<QParams>& whole, float* out) const {
  if (const Int8* int8 = std::get_if<Int8>(&held_)) {
    EpilogueArgs epilogue = int8->columns.args;
    epilogue.out = out;
    const FloatRows source{kernels, rows, dtype, int8->scheme, whole};
    return dynquant::multiply(kernels, source, rows.m, int8->weight, epilogue, sizeof(float));
  }
  const Float& held = std::get<Float>(held_);
  half_matmul(kernels, {rows.data, dtype, rows.m, rows.stride}, held.weight, held.bias.data, out,
              Dtype::f32, held.weight.n);
}

}  // namespace dynquant
