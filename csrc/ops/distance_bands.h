// The products of the rows of a head and vectors of distances.
#pragma once

#include "attention_core.h"
#include "float_rows.h"
#include "pieces.h"

namespace dynquant {

// `count` rows of each head, queries or keys, and the vectors of the distances between them and
// `columns` others: number t - r + count - 1 is for row r and column t. Neither may be 0.
struct DistanceTerm {
  Heads rows, vectors;  // the vectors are the same for every sequence
  Dtype dtype;
  int64_t count, columns;
};

// Their products for one head of one sequence after the other, in one thread. Of the columns that a
// row needs of all vectors, the next row needs those that begin one earlier. So rows are multiplied
// in bands, by all vectors that one of them needs.
class DistanceBands {
 public:
  // So that the first column of each band begins a panel and a strip; for that, there are columns
  // of zeros in front of those of the first vector.
  static constexpr int64_t kRows = kPanelColumns;
  static_assert(kRows % kStripColumns == 0);

  DistanceBands(const Kernels& kernels, const DistanceTerm& term, int64_t dim, bool integers)
      : kernels_(kernels), term_(term), dim_(dim), integers_(integers) {}

  int64_t count() const { return ceil_div(term_.count, kRows); }
  // Memory for it, and for so many bands at once.
  int64_t bytes(int64_t kept) const;
  void take(uint8_t* memory, int64_t kept);

  void begin_head(int64_t head);
  void begin_sequence(int64_t b);
  // A band's products, kept as one of those.
  void multiply(int64_t band, int64_t kept) const;
  // The product for a kept band's first row and column 0, and how many values behind each column of
  // a row that of the next one lies.
  const float* first_of(int64_t kept) const { return bands_ + kept * band_values() + kRows - 1; }
  int64_t row_step() const { return stride() - 1; }

 private:
  int64_t width() const { return term_.columns + kRows - 1; }  // of a band
  int64_t stride() const { return ceil_div(width(), kStripColumns) * kStripColumns; }
  int64_t band_values() const { return kRows * stride(); }
  int64_t columns() const { return count() * kRows + term_.columns - 1; }   // of all bands
  int64_t columns_before() const { return count() * kRows - term_.count; }  // the first vector

  int64_t value_bytes() const { return integers_ ? 1 : static_cast<int64_t>(sizeof(float)); }
  int64_t row_bytes() const { return term_.count * dim_ * value_bytes() + kTileLine; }
  int64_t vector_bytes() const { return columns() * dim_ * value_bytes() + kTileLine; }
  int64_t row_values() const { return integers_ ? filled_up(term_.count) : 0; }
  int64_t vector_values() const { return integers_ ? filled_up(columns()) : 0; }
  int64_t weight_bytes() const;

  void quantize(const char* x, int64_t stride, int64_t count, uint8_t* q, float* scale,
                int32_t* zero_point) const;
  void widen(const char* x, int64_t stride, int64_t count, float* to) const;

  const Kernels& kernels_;
  const DistanceTerm term_;
  const int64_t dim_;
  const bool integers_;
  int64_t head_ = 0;
  // Of a head, in bytes or in fp32; the vectors also as a weight, in panels or in strips.
  uint8_t *rows_, *vectors_, *weight_;
  float *row_scale_, *vector_scale_;
  int32_t* zero_point_;
  float* bands_;
};

}  // namespace dynquant
