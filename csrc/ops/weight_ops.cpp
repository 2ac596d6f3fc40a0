// quantize_weight, pack_weight and unpack_weight.
#include <atomic>
#include <cmath>
#include <cstring>

#include "../cpu/dispatch.h"
#include "../cpu/pack.h"
#include "ops.h"
#include "packed.h"
#include "parallel.h"

namespace dynquant {
namespace {

constexpr float kSmallestScale = 0x1p-126f;

float weight_scale_of(const Range& range) {
  return (-range.lo > range.hi ? -range.lo : range.hi) / 127.0f;
}

void quantize_weight_row(const Kernels& kernels, const char* x, Dtype dtype, int64_t k,
                         float* scale, uint8_t* q) {
  const bool tiny = *scale < kSmallestScale;
  if (tiny) *scale = 1.0f;
  QuantizeArgs a = {};
  a.x = x;
  a.dtype = dtype;
  a.k = k;
  a.factor = *scale;
  a.q_min = tiny ? 0 : -127;
  a.q_max = tiny ? 0 : 127;
  a.q = q;
  kernels.quantize_divide(a);
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, bool per_channel) {
  const Dtype dtype = check_float(weight, "weight");
  check_weight_shape(weight, "weight");
  const Kernels& kernels = kernels_in_use();
  const Rows rows = rows_of(weight, "weight");
  Tensor q = empty({rows.m, rows.k}, ScalarType::Char);
  Tensor scale = empty({per_channel ? rows.m : 1}, ScalarType::Float);
  std::vector<float> row_scale(static_cast<size_t>(rows.m));
  std::atomic<bool> finite{true};
  run_range(Threads::kOwn, rows.m, rows.k, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const Range range = kernels.range(rows.data + m * rows.stride, dtype, rows.k);
      const float s = weight_scale_of(range);
      if (range.has_nan || !std::isfinite(s)) finite = false;
      row_scale[static_cast<size_t>(m)] = s;
    }
  });
  check(finite, "weight holds NaN or Inf, which int8 cannot");
  float* scales = static_cast<float*>(scale.mutable_data_ptr());
  float whole = 0.0f;
  if (!per_channel) {
    for (float s : row_scale) whole = std::max(whole, s);
    *scales = whole < kSmallestScale ? 1.0f : whole;
  }
  uint8_t* bytes = static_cast<uint8_t*>(q.mutable_data_ptr());
  run_range(Threads::kOwn, rows.m, rows.k, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float s = per_channel ? row_scale[static_cast<size_t>(m)] : whole;
      quantize_weight_row(kernels, rows.data + m * rows.stride, dtype, rows.k, &s,
                          bytes + m * rows.k);
      if (per_channel) scales[m] = s;
    }
  });
  return {q, scale};
}

Tensor pack_weight(const Tensor& qweight) {
  check_tensor(qweight, "qweight", {ScalarType::Char});
  check_weight_shape(qweight, "qweight");
  const Rows rows = rows_of(qweight, "qweight");
  const int64_t n = rows.m, k = rows.k;
  const int8_t* weight = reinterpret_cast<const int8_t*>(rows.data);
  Tensor packed = empty({packed_bytes(n, k)}, ScalarType::Char);
  int8_t* base = static_cast<int8_t*>(packed.mutable_data_ptr());
  pack_header(base, n, k);
  run_range(Threads::kOwn, panels_of(n), panel_bytes(k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_panel(weight, rows.stride, n, k, p, base);
  });
  return packed;
}

Packed check_packed(const Tensor& packed, const char* name) {
  check_tensor(packed, name, {ScalarType::Char});
  check(packed.dim() == 1 && packed.is_contiguous(), name,
        " must be the contiguous one-dimensional tensor that pack_weight gives, got shape ",
        ShapeOf(packed));
  return packed_at(static_cast<const int8_t*>(packed.const_data_ptr()), packed.numel(), name);
}

Packed packed_at(const int8_t* base, int64_t bytes, const char* name, bool has_more) {
  check(bytes >= kHeaderBytes, name, " is too small to be a packed weight");
  PackedHeader header;
  std::memcpy(&header, base, sizeof header);
  check(header.magic == kPackedMagic, name, " is not a weight packed by pack_weight");
  check(header.version == kLayoutVersion, name, " has layout version ", header.version,
        ", this library reads version ", kLayoutVersion, ": pack the weight again");
  const bool is_valid = header.n >= 0 && header.n < kMaxN && header.k >= 0 && header.k <= kMaxK;
  const int64_t wanted = is_valid ? packed_bytes(header.n, header.k) : -1;
  check(is_valid && (has_more ? wanted <= bytes : wanted == bytes), name, " has ", bytes,
        " bytes, which does not fit its header (N = ", header.n, ", K = ", header.k, ")");
  return {base + kHeaderBytes, header.n, header.k};
}

Tensor unpack_weight(const Tensor& packed, int64_t n, int64_t k) {
  const Packed weight = check_packed(packed);
  check(n == weight.n && k == weight.k, "n and k must be those of packed (", weight.n, ", ",
        weight.k, "), got ", n, " and ", k);
  Tensor q = empty({n, k}, ScalarType::Char);
  const int8_t* base = static_cast<const int8_t*>(packed.const_data_ptr());
  int8_t* rows = static_cast<int8_t*>(q.mutable_data_ptr());
  run_range(Threads::kOwn, n, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      unpack_row(base, k, row, rows + row * k);
    }
  });
  return q;
}

}  // namespace dynquant
