// int_mm, rescale, scaled_mm and linear_dynamic: one driver over two sources of staged rows.
#include "activation.h"
#include "gemm_driver.h"
#include "ops.h"
#include "parallel.h"

namespace dynquant {
namespace {

struct QuantizedRows {
  const Kernels& kernels;
  Rows rows;
  bool is_signed;
  PerRow zero_points;
  std::optional<PerRow> scales;

  QuantizedRows(const Kernels& k, const Tensor& q, const Tensor& zero_point)
      : kernels(k),
        rows(check_q(q)),
        is_signed(q.scalar_type() == ScalarType::Char),
        zero_points(per_row(zero_point, "zero_point", ScalarType::Int, q)) {
    const int32_t lowest = is_signed ? -128 : 0;
    for (int64_t m = 0; m < (zero_points.step == 0 ? 1 : rows.m); ++m) {
      const int32_t value = zero_points.at<int32_t>(m);
      check(value >= lowest && value <= lowest + 255, "zero_point must lie in [", lowest, ", ",
            lowest + 255, "] for q of ", dtype_text(q.scalar_type()), ", got ", value);
    }
  }

  StagedRow stage(int64_t m, uint8_t* staged) const {
    const uint8_t* q = reinterpret_cast<const uint8_t*>(rows.data + m * rows.stride);
    // Flipping the top bit adds 128.
    kernels.stage(q, rows.k, is_signed ? 0x80 : 0, staged);
    return {scales.has_value() ? scales->at<float>(m) : 0.0f,
            zero_points.at<int32_t>(m) + (is_signed ? 128 : 0)};
  }

 private:
  static Rows check_q(const Tensor& q) {
    check_tensor(q, "q", {ScalarType::Byte, ScalarType::Char});
    return rows_of(q, "q");
  }
};

void check_inner(const char* name, const Rows& rows, const Tensor& given, const Packed& weight) {
  check(rows.k == weight.k, name, " must have K = ", weight.k,
        " as its last dimension, like packed, got ", ShapeOf(given));
}

}  // namespace

Tensor int_mm(const Tensor& q, const Tensor& zero_point, const Tensor& packed, int64_t n) {
  const Kernels& kernels = kernels_in_use();
  const QuantizedRows source(kernels, q, zero_point);
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
  QuantizedRows source(kernels, q, zero_point);
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
                      const std::optional<Tensor>& bias, bool per_token, bool symmetric) {
  const Kernels& kernels = kernels_in_use();
  const Dtype dtype = check_float(x, "x");
  FloatRows source{kernels, rows_of(x, "x"), dtype, symmetric, std::nullopt};
  const Packed weight = check_packed(packed);
  check_inner("x", source.rows, x, weight);
  Columns columns(weight_scale, bias, weight.n);
  if (!per_token) {
    source.whole = choose_qparams(range_of_rows(kernels, source.rows, dtype), symmetric);
  }
  Tensor out = empty(leading_shape(x, weight.n), x.scalar_type());
  columns.args.out = out.mutable_data_ptr();
  columns.args.out_dtype = dtype;
  columns.args.out_stride = weight.n;
  multiply(kernels, source, source.rows.m, weight, columns.args,
           static_cast<int64_t>(out.element_size()));
  return out;
}

}  // namespace dynquant
