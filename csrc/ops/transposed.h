// A matrix of floats as its transpose.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "../cpu/transpose.h"

namespace dynquant {

// to_row(j)[i] = from[i, j]. The stride is in values.
template <class ToRow>
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
               const ToRow& to_row) {
  constexpr int64_t kSide = 4;
  const int64_t whole = rows / kSide * kSide;
  int64_t j = 0;
  for (; j + kSide <= columns; j += kSide) {
    float* to[kSide];
    for (int64_t c = 0; c < kSide; ++c) to[c] = to_row(j + c);
    for (int64_t i = 0; i < whole; i += kSide) {
      const float* x = from + i * from_stride + j;
      FourFloats block[kSide];
      for (int64_t r = 0; r < kSide; ++r) block[r] = load_four(x + r * from_stride);
      transpose_four(block);
      for (int64_t c = 0; c < kSide; ++c) store_four(block[c], to[c] + i);
    }
    for (int64_t i = whole; i < rows; ++i) {
      for (int64_t c = 0; c < kSide; ++c) to[c][i] = from[i * from_stride + j + c];
    }
  }
  for (; j < columns; ++j) {
    float* to = to_row(j);
    for (int64_t i = 0; i < rows; ++i) to[i] = from[i * from_stride + j];
  }
}

}  // namespace dynquant
