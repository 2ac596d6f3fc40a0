// Rows of a head as a product reads them.
#pragma once

#include "gemm_driver.h"

namespace dynquant {

// Rows [0, m) of a source in the memory for a head's rows.
template <class Source>
inline StagedRows stage_head(const Product& product, const Source& source, int64_t k, int64_t m) {
  const StagedRows rows(product, k, m, source.bytes(), Purpose::head_rows);
  rows.stage(source, 0, 0, m);
  return rows;
}

// Rows of k values that are quantized already, next to each other.
struct ByteRows {
  uint8_t* q;
  float* scale;
  int32_t* zero_point;
  int64_t k;

  int64_t bytes() const { return 1; }
  StagedRow stage(const Product& product, int64_t m, uint8_t* staged, uint8_t*) const {
    product.stage(q + m * k, k, 0, staged);
    return {scale[m], zero_point[m]};
  }
  StagedRows staged(const Product& product, int64_t m) const {
    if (StagedRows::reads_plain(product) && k % kGroup == 0) {
      return {product, k, q, k, scale, zero_point};
    }
    return stage_head(product, *this, k, m);
  }
};

}  // namespace dynquant
