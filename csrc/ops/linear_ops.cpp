// int_mm, rescale, scaled_mm and linear_dynamic: one driver over two sources of staged rows.
#include <cstring>

#include "../cpu/dispatch.h"
#include "activation.h"
#include "columns.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"
#include "scratch.h"
#include "split.h"

namespace dynquant {
namespace {

// Rows of activations: `stage(m, row)` writes row m as the kernels read it, and gives its scale and
// the zero point of its unsigned form.
struct StagedRow {
  float scale;
  int32_t zero_point;
};

constexpr int64_t kBlockRows = 192;  // rows whose staged form waits for one pass over panels
constexpr int64_t kBlockBytes = 1024 * 1024;  // but not more than this, where rows are long

template <class Source>
void multiply(const Kernels& kernels, const Source& source, int64_t m, const Packed& weight,
              const EpilogueArgs& epilogue, int64_t out_bytes) {
  const int64_t groups = groups_of(weight.k);
  // Rows at a power of two would share few cache sets: a line more between them spreads them.
  const int64_t stride = ceil_div(groups * kernels.group_bytes, 64) * 64 + 64;
  const int64_t block = std::max<int64_t>(8, std::min(kBlockRows, kBlockBytes / stride));
  const int64_t panels = panels_of(weight.n);
  const Split split = choose_split(m, weight.n, weight.k, num_threads());
  run_tasks(split.rows * split.columns, [&](int64_t task) {
    const int64_t row_part = task / split.columns, column_part = task % split.columns;
    const int64_t m_begin = m * row_part / split.rows, m_end = m * (row_part + 1) / split.rows;
    GemmArgs a = {};
    a.panels = weight.panels;
    a.groups = groups;
    a.n_begin = panels * column_part / split.columns * kPanelColumns;
    a.n_end = std::min(weight.n, panels * (column_part + 1) / split.columns * kPanelColumns);
    if (a.n_begin >= a.n_end || m_begin >= m_end) return;
    const int64_t blocks = ceil_div(m_end - m_begin, block);
    uint8_t* staged = scratch(static_cast<size_t>(std::min(block, m_end - m_begin) * stride));
    float scale[kBlockRows];
    int32_t zero_point[kBlockRows];
    a.staged = staged;
    a.staged_stride = stride;
    a.zero_point = zero_point;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = m_begin + (m_end - m_begin) * b / blocks;
      const int64_t end = m_begin + (m_end - m_begin) * (b + 1) / blocks;
      for (int64_t row = begin; row < end; ++row) {
        const StagedRow values = source.stage(row, staged + (row - begin) * stride);
        scale[row - begin] = values.scale;
        zero_point[row - begin] = values.zero_point;
      }
      a.m = end - begin;
      a.epilogue = epilogue;
      a.epilogue.scale = scale;
      a.epilogue.out = static_cast<char*>(epilogue.out) + begin * epilogue.out_stride * out_bytes;
      kernels.gemm(a);
    }
  });
}

struct FloatRows {
  const Kernels& kernels;
  Rows rows;
  Dtype dtype;
  bool symmetric;
  std::optional<QParams> whole;  // per_tensor

  StagedRow stage(int64_t m, uint8_t* staged) const {
    const char* x = rows.data + m * rows.stride;
    const QParams p =
        whole.has_value() ? *whole : choose_qparams(kernels.range(x, dtype, rows.k), symmetric);
    QuantizeArgs a = quantize_args(p, symmetric, true);
    a.x = x;
    a.dtype = dtype;
    a.k = rows.k;
    a.q = staged;
    kernels.quantize_staged(a);
    return {p.scale, p.zero_point + a.shift};
  }
};

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
    const Range range = range_of_rows(kernels, source.rows, dtype);
    const FloatEnv env;
    source.whole = choose_qparams(range, symmetric);
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
