// choose_qparams, quantize_activation and quantize_with.
#include "../cpu/dispatch.h"
#include "activation.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace dynquant {

Range range_of_rows(const Kernels& kernels, const Rows& rows, Dtype dtype) {
  Range whole = {0.0f, 0.0f, false};
  const int64_t parts = parts_worth(Threads::kPool, rows.m, rows.k);
  std::vector<Range> part_ranges(static_cast<size_t>(parts), whole);
  run_tasks(parts, [&](int64_t part) {
    const int64_t begin = rows.m * part / parts, end = rows.m * (part + 1) / parts;
    Range& sum = part_ranges[static_cast<size_t>(part)];
    for (int64_t m = begin; m < end; ++m) {
      sum = merge(sum, kernels.range(rows.data + m * rows.stride, dtype, rows.k));
    }
  });
  for (const Range& part : part_ranges) whole = merge(whole, part);
  return whole;
}

std::optional<QParams> ActivationScheme::whole(const Kernels& kernels, const Rows& rows,
                                               Dtype dtype) const {
  if (per_token) return std::nullopt;
  return choose(range_of_rows(kernels, rows, dtype));
}

namespace {

// Scale and zero point of every row, and what `each` makes of them.
template <class F>
void for_each_row(const Kernels& kernels, const Rows& rows, Dtype dtype,
                  const ActivationScheme& scheme, const F& each) {
  const std::optional<QParams> whole = scheme.whole(kernels, rows, dtype);
  run_range(rows.m, rows.k * 4, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const char* x = rows.data + m * rows.stride;
      each(m, x, whole.has_value() ? *whole : scheme.choose(kernels.range(x, dtype, rows.k)));
    }
  });
  if (whole.has_value() && rows.m == 0) each(-1, nullptr, *whole);
}

struct Params {
  Tensor scale, zero_point;
  float* scales;
  int32_t* zero_points;

  Params(const Tensor& x, bool per_token) {
    const std::vector<int64_t> shape = per_token ? leading_shape(x, -1) : std::vector<int64_t>{1};
    scale = empty(shape, ScalarType::Float);
    zero_point = empty(shape, ScalarType::Int);
    scales = static_cast<float*>(scale.mutable_data_ptr());
    zero_points = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  }
  void set(int64_t row, const QParams& p) const {
    scales[row] = p.scale;
    zero_points[row] = p.zero_point;
  }
};

// One row of q by a kernel that gives bytes, which are joined where q has 16 bits.
void quantize_row(void (*kernel)(const QuantizeArgs&), QuantizeArgs& a, int bits, char* q) {
  if (bits == 8) {
    a.q = reinterpret_cast<uint8_t*>(q);
    return kernel(a);
  }
  a.q = scratch(static_cast<size_t>(2 * a.k), Purpose::bytes_of_row);
  a.low = a.q + a.k;
  kernel(a);
  uint16_t* joined = reinterpret_cast<uint16_t*>(q);
  for (int64_t i = 0; i < a.k; ++i) joined[i] = static_cast<uint16_t>(a.q[i] << 8 | a.low[i]);
}

}  // namespace

std::tuple<Tensor, Tensor> choose_qparams(const Tensor& x, bool per_token, bool symmetric,
                                          int64_t bits) {
  const ActivationScheme scheme(per_token, symmetric, bits, "bits");
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const Params params(x, per_token);
  const Kernels& kernels = kernels_in_use();
  if (const auto whole = scheme.whole(kernels, rows, dtype)) {
    params.set(0, *whole);
  } else {
    for_each_row(kernels, rows, dtype, scheme,
                 [&](int64_t m, const char*, const QParams& p) { params.set(m, p); });
  }
  return {params.scale, params.zero_point};
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, bool per_token,
                                                       bool symmetric, int64_t bits) {
  const ActivationScheme scheme(per_token, symmetric, bits, "bits");
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const Params params(x, per_token);
  const Kernels& kernels = kernels_in_use();
  Tensor q = empty(leading_shape(x, rows.k), scheme.q_type());
  char* base = static_cast<char*>(q.mutable_data_ptr());
  const int64_t row_bytes = rows.k * scheme.bits / 8;
  for_each_row(kernels, rows, dtype, scheme, [&](int64_t m, const char* x_row, const QParams& p) {
    if (per_token || m <= 0) params.set(per_token ? m : 0, p);
    if (m < 0) return;
    QuantizeArgs a = quantize_args(p, symmetric, false, scheme.bits);
    a.x = x_row;
    a.dtype = dtype;
    a.k = rows.k;
    quantize_row(kernels.quantize, a, scheme.bits, base + m * row_bytes);
  });
  return {q, params.scale, params.zero_point};
}

Tensor quantize_with(const Tensor& x, const Tensor& scale, const Tensor& zero_point, bool symmetric,
                     int64_t bits) {
  const ActivationScheme scheme(true, symmetric, bits, "bits");
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const PerRow scales = per_row(scale, "scale", ScalarType::Float, x);
  const PerRow zero_points = per_row(zero_point, "zero_point", ScalarType::Int, x);
  const int32_t levels = symmetric ? 127 : bits == 16 ? 65535 : 255;
  const int32_t highest = symmetric ? 0 : levels;
  for (int64_t m = 0; m < (zero_points.step == 0 ? 1 : rows.m); ++m) {
    const int32_t value = zero_points.at<int32_t>(m);
    check(value >= 0 && value <= highest, "zero_point must lie in [0, ", highest, "] (",
          symmetric ? "symmetric" : "asymmetric", "), got ", value);
  }
  const Kernels& kernels = kernels_in_use();
  Tensor q = empty(leading_shape(x, rows.k), scheme.q_type());
  char* base = static_cast<char*>(q.mutable_data_ptr());
  const int64_t row_bytes = rows.k * bits / 8;
  run_range(rows.m, rows.k * 4, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      QuantizeArgs a = {};
      a.x = rows.data + m * rows.stride;
      a.dtype = dtype;
      a.k = rows.k;
      a.factor = scales.at<float>(m);
      a.zero_point = zero_points.at<int32_t>(m);
      a.q_min = symmetric ? -127 : 0;
      a.q_max = levels;
      quantize_row(kernels.quantize_divide, a, scheme.bits, base + m * row_bytes);
    }
  });
  return q;
}

}  // namespace dynquant
