// Rows of a head as a product reads them.
#pragma once

#include "gemm_driver.h"

namespace dynquant {

// `count` rows of k values, `stride` bytes apart, as bytes next to each other, each with its scale
// and, unless they are symmetric and it is null, its zero point.
inline void quantize_rows(const Kernels& kernels, const char* x, Dtype dtype, int64_t stride,
                          int64_t count, int64_t k, uint8_t* q, float* scale, int32_t* zero_point) {
  QuantizeVectorsArgs a = {};
  a.x = x;
  a.dtype = dtype;
  a.count = count;
  a.x_stride = stride / bytes_of(dtype);
  a.k = k;
  a.symmetric = zero_point == nullptr;
  a.q = q;
  a.q_stride = k;
  a.scale = scale;
  a.zero_point = zero_point;
  a.value_stride = 1;
  kernels.quantize_vectors(a);
}

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
