// Sums of vectors, each times a weight: the product of rows of weights and the transpose of the
// vectors, in the order of sums of half.inl.h and so with its bits, but without the transpose,
// which for a few rows would take longer than all else.
#pragma once

#include <string.h>

#include "kernels.h"
#include "quantize.inl.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

constexpr int64_t kSumColumns = 64;  // of a strip whose partial sums wait in the L1 cache

// One row of weights and at most kSumColumns columns of the vectors. Vectors are read in the order
// in which they lie in memory.
template <class Isa, class T>
inline void weighted_strip(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                           int64_t columns, float* out) {
  alignas(64) float partials[kPartials][kSumColumns];
  memset(partials, 0, sizeof partials);
  for (int64_t j = 0; j < a.n; ++j) {
    float* sums = partials[j % kPartials];
    const T* vector = vectors + j * a.vector_stride;
    each_registers<Isa>(columns, [&](int64_t i, auto isa, auto part) {
      using Many = decltype(isa);
      const auto product = Many::mul(Many::set(weights[j]), part.load(vector + i));
      Many::store(sums + i, Many::add_float(Many::load(sums + i), product));
    });
  }
  for (int step = kPartials / 2; step > 0; step /= 2) {
    for (int p = 0; p < step; ++p) {
      each_register<Isa>(kSumColumns, [&](int64_t i, auto part) {
        part.store(partials[p] + i,
                   Isa::add_float(part.load(partials[p] + i), part.load(partials[p + step] + i)));
      });
    }
  }
  memcpy(out, partials[0], static_cast<size_t>(columns) * sizeof(float));
}

template <class Isa>
void weighted_sums(const WeightedSumsArgs& a) {
  with_type(a.vectors, a.dtype, [&](const auto* vectors) {
    for (int64_t first = 0; first < a.dim; first += kSumColumns) {
      const int64_t columns = a.dim - first < kSumColumns ? a.dim - first : kSumColumns;
      for (int64_t row = 0; row < a.rows; ++row) {
        weighted_strip<Isa>(a, a.weights + row * a.weight_stride, vectors + first, columns,
                            a.out + row * a.out_stride + first);
      }
    }
  });
}

}  // namespace
}  // namespace dynquant
