// int_mm, rescale, scaled_mm and linear_dynamic: one driver over two sources of staged rows.
#include "activation.h"
#include "gemm_driver.h"
#include "ops.h"
#include "parallel.h"

namespace dynquant {
namespace {

struct QuantizedRows {
  Rows rows;
  bool is_signed;
  bool is_wide;
  PerRow zero_points;
  std::optional<PerRow> scales;

  // Where `wide_too`, q may have 16 bits.
  QuantizedRows(const Tensor& q, const Tensor& zero_point, bool wide_too)
      : rows(check_q(q, wide_too)),
        is_signed(q.scalar_type() == ScalarType::Char),
        is_wide(q.scalar_type() == ScalarType::UInt16),
        zero_points(per_row(zero_point, "zero_point", ScalarType::Int, q)) {
    const int32_t lowest = is_signed ? -128 : 0;
    const int32_t highest = is_wide ? 65535 : lowest + 255;
    for (int64_t m = 0; m < (zero_points.step == 0 ? 1 : rows.m); ++m) {
      const int32_t value = zero_points.at<int32_t>(m);
      check(value >= lowest && value <= highest, "zero_point must lie in [", lowest, ", ", highest,
            "] for q of ", dtype_text(q.scalar_type()), ", got ", value);
    }
  }

  int64_t bytes() const { return is_wide ? 2 : 1; }

  StagedRow stage(const Product& product, int64_t m, uint8_t* staged, uint8_t* low) const {
    const char* row = rows.data + m * rows.stride;
    if (is_wide) {
      stage_wide(product, reinterpret_cast<const uint16_t*>(row), staged, low);
    } else {
      // Flipping the top bit adds 128.
      product.stage(reinterpret_cast<const uint8_t*>(row), rows.k, is_signed ? 0x80 : 0, staged);
    }
    return {scales.has_value() ? scales->at<float>(m) : 0.0f,
            zero_points.at<int32_t>(m) + (is_signed ? 128 : 0)};
  }

 private:
  void stage_wide(const Product& product, const uint16_t* q, uint8_t* high, uint8_t* low) const {
    uint8_t* bytes = scratch(static_cast<size_t>(rows.k), Purpose::bytes_of_row);
    for (const auto& [staged, shift] : {std::pair{high, 8}, std::pair{low, 0}}) {
      for (int64_t i = 0; i < rows.k; ++i) bytes[i] = static_cast<uint8_t>(q[i] >> shift);
      product.stage(bytes, rows.k, 0, staged);
    }
  }

  static Rows check_q(const Tensor& q, bool wide_too) {
    if (wide_too) {
      check_tensor(q, "q", {ScalarType::Byte, ScalarType::Char, ScalarType::UInt16});
    } else {
      check_tensor(q, "q", {ScalarType::Byte, ScalarType::Char});
    }
    return rows_of(q, "q");
  }
};

void check_inner(const char* name, const Rows& rows, const Tensor& given, const Packed& weight) {
  check(rows.k == weight.k, name, " must have K = ", weight.k,
        " as its last dimension, as the packed weight has, got ", ShapeOf(given));
}

}  // namespace

Tensor int_mm(const Tensor& q, const Tensor& zero_point, const Tensor& packed, int64_t n) {
  const Kernels& kernels = kernels_in_use();
  const QuantizedRows source(q, zero_point, false);
  const Packed weight = check_packed(packed);
  check_inner("q", source.rows, q, weight);
  check(n == weight.n, "n must be that of packed, ", weight.n, ", got ", n);
  Tensor out = empty(leading_shape(q, n), ScalarType::Int);
  EpilogueArgs epilogue = {};
  epilogue.out = out.mutable_data_ptr();
  epilogue.out_dtype = Dtype::i32;
  epilogue.out_stride = n;
  multiply(kernels, source, source.rows.m, weight, epilogue, sizeof(int32_t));
  return out;
}

Tensor rescale(const Tensor& acc, const Tensor& scale, const Tensor& weight_scale,
               const std::optional<Tensor>& bias, ScalarType dtype) {
  check_tensor(acc, "acc", {ScalarType::Int});
  const Rows rows = rows_of(acc, "acc");
  const PerRow scales = per_row(scale, "scale", ScalarType::Float, acc);
  const Kernels& kernels = kernels_in_use();
  const Columns columns(weight_scale, bias, rows.k);
  const Dtype out_dtype = check_out_dtype(dtype);
  Tensor out = empty(leading_shape(acc, rows.k), dtype);
  const int64_t out_bytes = static_cast<int64_t>(out.element_size());
  char* base = static_cast<char*>(out.mutable_data_ptr());
  run_range(rows.m, rows.k * 4, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float row_scale = scales.at<float>(m);
      RescaleArgs a = {};
      a.acc = reinterpret_cast<const int32_t*>(rows.data + m * rows.stride);
      a.m = 1;
      a.n = rows.k;
      a.epilogue = columns.args;
      a.epilogue.scale = &row_scale;
      a.epilogue.out = base + m * rows.k * out_bytes;
      a.epilogue.out_dtype = out_dtype;
      a.epilogue.out_stride = rows.k;
      kernels.rescale(a);
    }
  });
  return out;
}

Tensor scaled_mm(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                 const Tensor& packed, const Tensor& weight_scale,
                 const std::optional<Tensor>& bias, ScalarType dtype) {
  const Kernels& kernels = kernels_in_use();
  QuantizedRows source(q, zero_point, true);
  source.scales = per_row(scale, "scale", ScalarType::Float, q);
  const Packed weight = check_packed(packed);
  check_inner("q", source.rows, q, weight);
  Columns columns(weight_scale, bias, weight.n);
  columns.args.out_dtype = check_out_dtype(dtype);
  Tensor out = empty(leading_shape(q, weight.n), dtype);
  columns.args.out = out.mutable_data_ptr();
  columns.args.out_stride = weight.n;
  multiply(kernels, source, source.rows.m, weight, columns.args,
           static_cast<int64_t>(out.element_size()));
  return out;
}

Tensor linear_dynamic(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, bool per_token, bool symmetric,
                      int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  const Kernels& kernels = kernels_in_use();
  const Dtype dtype = check_float(x, "x");
  FloatRows source{kernels, rows_of(x, "x"), dtype, scheme, std::nullopt};
  const Packed weight = check_packed(packed);
  check_inner("x", source.rows, x, weight);
  Columns columns(weight_scale, bias, weight.n);
  source.whole = scheme.whole(kernels, source.rows, dtype);
  Tensor out = empty(leading_shape(x, weight.n), x.scalar_type());
  columns.args.out = out.mutable_data_ptr();
  columns.args.out_dtype = dtype;
  columns.args.out_stride = weight.n;
  multiply(kernels, source, source.rows.m, weight, columns.args,
           static_cast<int64_t>(out.element_size()));
  return out;
}

}  // namespace dynquant
