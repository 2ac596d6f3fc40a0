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

// Columns of all rows or heads of a strip together, whose partial sums wait in the L1 cache.
constexpr int kSumColumns = 256;
// Vectors of one partial sum that are taken together, so that it is read and written less often:
// with two rows 1.4 to 1.8 times as fast on an AMD Zen 3, with one 1.1 to 1.2 times.
constexpr int kVectors = 4;
// The vector that is fetched meanwhile, where heads are side by side.
constexpr int64_t kFetchedVector = 2;

// Adds some vectors of one partial sum, each kPartials behind the one before, to that sum of each
// of Rows rows of weights, which are weight_stride and sums_stride apart.
template <class Isa, int Rows, int Vectors, class T>
inline void add_vectors(const float* weights, int64_t weight_stride, const T* vectors,
                        int64_t vector_stride, int64_t columns, float* sums, int64_t sums_stride) {
  each_registers<Isa>(columns, [&](int64_t i, auto isa, auto part) {
    using Many = decltype(isa);
    typename Many::Float sum[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sum[r] = Many::load(sums + r * sums_stride + i);
#pragma GCC unroll 4
    for (int t = 0; t < Vectors; ++t) {
      const auto vector = part.load(vectors + t * kPartials * vector_stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const auto weight = Many::set(weights[r * weight_stride + t * kPartials]);
        sum[r] = Many::add_float(sum[r], Many::mul(weight, vector));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) Many::store(sums + r * sums_stride + i, sum[r]);
  });
}

// The partial sums of one row, of at most Width columns, become its output.
template <class Isa, int Width>
inline void store_sums(float (&partials)[kPartials][Width], int64_t columns, float* out) {
  float* sums = partials[0];
  for (int64_t half = kPartials / 2 * Width; half >= Width; half /= 2) {
    each_register<Isa>(half, [&](int64_t i, auto part) {
      part.store(sums + i, Isa::add_float(part.load(sums + i), part.load(sums + half + i)));
    });
  }
  memcpy(out, sums, static_cast<size_t>(columns) * sizeof(float));
}

// Rows rows of weights and at most Width columns of the vectors.
template <class Isa, int Width, int Rows, class T>
inline void rows_strip(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                       int64_t columns, float* out) {
  alignas(64) float partials[Rows][kPartials][Width];
  memset(partials, 0, sizeof partials);
  const auto add = [&](int64_t j, auto count) {
    add_vectors<Isa, Rows, count.kCount>(weights + j, a.weight_stride,
                                         vectors + j * a.vector_stride, a.vector_stride, columns,
                                         partials[0][j % kPartials], kPartials * Width);
  };
  for (int64_t first = 0; first < a.n; first += kPartials * kVectors) {
    for (int64_t j = first; j < a.n && j < first + kPartials; ++j) {
      if (j + kPartials * (kVectors - 1) < a.n) {
        add(j, Count<kVectors>());
      } else {
        int64_t last = j;
        for (; last + kPartials < a.n; last += 2 * kPartials) add(last, Count<2>());
        if (last < a.n) add(last, Count<1>());
      }
    }
  }
  for (int r = 0; r < Rows; ++r) store_sums<Isa>(partials[r], columns, out + r * a.out_stride);
}

// One row of weights of each of Heads heads, and at most Width columns of the vectors, which are
// read in the order in which they lie in memory, vector by vector of each head in turn: several
// streams (far.inl.h). Four heads are 1.2 to 1.4 times as fast on an AMD Zen 3 as one after the
// other; from a cache, 0.8 to 0.9 times.
template <class Isa, int Width, int Heads, class T>
inline void heads_strip(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                        int64_t columns, float* out) {
  alignas(64) float partials[Heads][kPartials][Width];
  memset(partials, 0, sizeof partials);
  for (int64_t j = 0; j < a.n; ++j) {
#pragma GCC unroll 4
    for (int head = 0; head < Heads; ++head) {
      constexpr int64_t kLine = 64 / sizeof(T);
      const T* vector = vectors + head * a.head_stride + j * a.vector_stride;
      const T* fetched = vector + kFetchedVector * a.vector_stride;
      for (int64_t i = 0; i < columns; i += kLine) __builtin_prefetch(fetched + i);
      add_vectors<Isa, 1, 1>(weights + head * a.rows * a.weight_stride + j, 0, vector, 0, columns,
                             partials[head][j % kPartials], 0);
    }
  }
  for (int head = 0; head < Heads; ++head) {
    store_sums<Isa>(partials[head], columns, out + head * a.rows * a.out_stride);
  }
}

template <class Isa, int Heads, class T>
inline void weighted_sums_of(const WeightedSumsArgs& a, const T* vectors) {
  constexpr int kWidth = kSumColumns / Heads, kRows = Heads < 2 ? 1 : 2;
  // f(its weights, vectors and outputs) for a row of a head and some columns.
  const auto with = [&](int64_t head, int64_t row, int64_t first, const auto& f) {
    const int64_t r = head * a.rows + row;
    f(a.weights + r * a.weight_stride, vectors + head * a.head_stride + first,
      a.dim - first < kWidth ? a.dim - first : kWidth, a.out + r * a.out_stride + first);
  };
  for (int64_t first = 0; first < a.dim; first += kWidth) {
    int64_t head = 0;
    if constexpr (Heads > 1) {
      for (; head + Heads <= a.heads; head += Heads) {
        for (int64_t row = 0; row < a.rows; ++row) {
          with(head, row, first, [&](auto... of) { heads_strip<Isa, kWidth, Heads>(a, of...); });
        }
      }
    }
    for (; head < a.heads; ++head) {
      int64_t row = 0;
      for (; row + kRows <= a.rows; row += kRows) {
        with(head, row, first, [&](auto... of) { rows_strip<Isa, kWidth, kRows>(a, of...); });
      }
      for (; row < a.rows; ++row) {
        with(head, row, first, [&](auto... of) { rows_strip<Isa, kWidth, 1>(a, of...); });
      }
    }
  }
}

template <class Isa>
void weighted_sums(const WeightedSumsArgs& a) {
  with_type(a.vectors, a.dtype, [&](const auto* vectors) {
    switch (heads_together(a.dim)) {
      case 4:
        return weighted_sums_of<Isa, 4>(a, vectors);
      case 2:
        return weighted_sums_of<Isa, 2>(a, vectors);
      default:
        return weighted_sums_of<Isa, 1>(a, vectors);
    }
  });
}

}  // namespace
}  // namespace dynquant
