// The arguments of the CUDA kernels, all in device memory. Strides are in bytes for activations and
// in elements for sums and results.
#pragma once

#include "../cpu/kernels.h"
#include "../cpu/layout.h"
#include "gpu.h"

namespace dynquant {

// One value for each row, or a single one for all.
template <class T>
struct RowValues {
  const T* data;
  int step;  // 1 or 0
};

// What becomes of sums: y = (float(acc) * scale[m]) * weight_scale[n] + bias[n], where acc is
// sum - zero_point[m] * column_sum[n]. Dtype::i32 stores acc itself.
struct FinishArgs {
  const int8_t* packed;           // null: the sums are corrected already
  RowValues<int32_t> zero_point;  // null where `packed` is
  int32_t zero_point_shift;       // 128 where signed bytes were read as unsigned ones
  RowValues<float> scale;
  const float* weight_scale;
  bool per_channel;
  const float* bias;  // or null
  void* out;
  Dtype out_dtype;
  int64_t m;
  int64_t n;
  int64_t k;
};

// Rows of bytes times a packed weight.
struct ProductArgs {
  const uint8_t* q;  // 16-byte aligned, and readable up to the next multiple of 16 of K
  int64_t q_stride;  // a multiple of 16
  uint32_t flip;     // 0x80808080 makes signed bytes unsigned
  int splits;        // parts of K, whose sums go to `partial` where there is more than one
  int32_t* partial;  // [splits, M, N]
  FinishArgs finish;
};

// Sums of several parts -> out.
struct SumArgs {
  const int32_t* partial;
  int64_t row_stride;
  int64_t part_stride;
  int parts;
  FinishArgs finish;
};

// How values become bytes.
enum class Rule : int32_t { asymmetric, symmetric, weight };

struct RowsArgs {
  const void* x;
  int64_t stride;
  int64_t m;
  int64_t k;
  bool aligned;  // rows start at multiples of 16 bytes
};

// Ranges of parts of all rows together.
struct RangeArgs {
  RowsArgs rows;
  Range* ranges;  // one for each block
};

struct QuantizeRowsArgs {
  RowsArgs rows;
  Rule rule;
  const Range* ranges;  // of the whole tensor; null: each row its own
  int range_count;
  RowValues<float> given_scale;  // null: scales follow from ranges
  RowValues<int32_t> given_zero_point;
  int32_t shift;  // added to the bytes and to the zero points
  uint8_t* q;     // or null: only the parameters are wanted
  int64_t q_stride;
  int64_t q_bytes;  // of a row, K or more; what lies beyond K becomes 0
  float* scale;     // for each row, or one; or null
  int32_t* zero_point;
  int32_t* refused;  // set to 1 where a weight holds NaN or Inf; or null
};

struct StageArgs {
  const uint8_t* q;
  int64_t stride;
  int64_t m;
  int64_t k;
  uint8_t* staged;
  int64_t staged_stride;  // all of it is written, zeros beyond K
};

struct PackArgs {
  const int8_t* weight;
  int64_t stride;
  int64_t n;
  int64_t k;
  int8_t* packed;
  int32_t* refused;  // set to 1 where the weight holds -128
};

// False for a `packed` that is not the weight which the caller expects from its length: its header
// lies in device memory, where the host cannot look without waiting.
DYNQUANT_DEVICE bool header_fits(const int8_t* packed, int64_t n, int64_t k) {
  const PackedHeader* header = reinterpret_cast<const PackedHeader*>(packed);
  return header->magic == kPackedMagic && header->version == kLayoutVersion && header->n == n &&
         header->k == k;
}

struct UnpackArgs {
  const int8_t* packed;
  int64_t n;
  int64_t k;
  int8_t* weight;
};

}  // namespace dynquant
