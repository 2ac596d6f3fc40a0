#include "distance_bias.h"

#include <algorithm>

#include "../cpu/transpose.h"

namespace dynquant {
namespace {

// out[i, j] = (a[i, j] + b[j, i]) * scale, of a and b what is not null.
void sum_transposed(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t m,
                    int64_t n, float scale, float* out, int64_t out_stride) {
  constexpr int64_t kSide = 4;
  for (int64_t i = 0; i < m; i += kSide) {
    int64_t j = 0;
    for (; i + kSide <= m && j + kSide <= n; j += kSide) {
      FourFloats x[kSide] = {};
      if (b != nullptr) {
        for (int64_t c = 0; c < kSide; ++c) x[c] = load_four(b + (j + c) * b_stride + i);
        transpose_four(x);
      }
      for (int64_t r = 0; r < kSide; ++r) {
        if (a != nullptr) {
          const FourFloats own = load_four(a + (i + r) * a_stride + j);
          x[r] = b != nullptr ? own + x[r] : own;
        }
        store_four(x[r] * scale, out + (i + r) * out_stride + j);
      }
    }
    for (int64_t r = i; r < std::min(i + kSide, m); ++r) {
      for (int64_t c = j; c < n; ++c) {
        const float own = a != nullptr ? a[r * a_stride + c] : b[c * b_stride + r];
        const float sum = a != nullptr && b != nullptr ? own + b[c * b_stride + r] : own;
        out[r * out_stride + c] = sum * scale;
      }
    }
  }
}

}  // namespace

DistanceBias::DistanceBias(const Kernels& kernels, const std::optional<DistanceTerm>& by_query,
                           const std::optional<DistanceTerm>& by_key, int64_t dim, float scale,
                           bool integers)
    : dim_(dim), scale_(scale), integers_(integers) {
  if (by_query.has_value()) by_query_.emplace(kernels, *by_query, dim, integers);
  if (by_key.has_value()) by_key_.emplace(kernels, *by_key, dim, integers);
}

void DistanceBias::take(uint8_t* memory) {
  Pieces pieces(memory);
  if (by_query_.has_value()) by_query_->take(pieces.next<uint8_t>(query_bytes()), 1);
  if (by_key_.has_value()) by_key_->take(pieces.next<uint8_t>(key_bytes()), by_key_->count());
}

double DistanceBias::nanoseconds() const {
  const double terms = (by_query_.has_value() ? 1.0 : 0.0) + (by_key_.has_value() ? 1.0 : 0.0);
  return terms * (0.3 + (integers_ ? 0.006 : 0.025) * static_cast<double>(dim_));
}

void DistanceBias::begin_head(int64_t head) {
  if (by_query_.has_value()) by_query_->begin_head(head);
  if (by_key_.has_value()) by_key_->begin_head(head);
}

void DistanceBias::compute(int64_t b, int64_t rows, int64_t keys, float* out, int64_t out_stride) {
  constexpr int64_t kRows = DistanceBands::kRows;
  int64_t query_step = 0, key_step = 0;
  if (by_query_.has_value()) {
    by_query_->begin_sequence(b);
    query_step = by_query_->row_step();
  }
  if (by_key_.has_value()) {
    by_key_->begin_sequence(b);
    key_step = by_key_->row_step();
    for (int64_t band = 0; band < by_key_->count(); ++band) by_key_->multiply(band, band);
  }
  for (int64_t i = 0; i < rows; i += kRows) {
    if (by_query_.has_value()) by_query_->multiply(i / kRows, 0);
    for (int64_t j = 0; j < keys; j += kRows) {
      const float* query = by_query_.has_value() ? by_query_->first_of(0) + j : nullptr;
      const float* key = by_key_.has_value() ? by_key_->first_of(j / kRows) + i : nullptr;
      sum_transposed(query, query_step, key, key_step, std::min(kRows, rows - i),
                     std::min(kRows, keys - j), scale_, out + i * out_stride + j, out_stride);
    }
  }
}

}  // namespace dynquant
