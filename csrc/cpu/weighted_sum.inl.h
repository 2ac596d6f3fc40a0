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

// Columns of all heads of a strip together, whose partial sums wait in the L1 cache.
constexpr int kSumColumns = 256;
// The vector that is fetched meanwhile, where heads are side by side.
constexpr int64_t kFetchedVector = 2;

// One row of weights of each of Heads heads, and at most Width columns of the vectors, which are
// read in the order in which they lie in memory, vector by vector of each head in turn: memory
// gives more to several streams of reads than to one. Four heads are 1.2 to 1.4 times as fast on an
// AMD Zen 3 as one after the other; from a cache, 0.8 times.
template <class Isa, int Width, int Heads, class T>
inline void weighted_strip(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                           int64_t columns, float* out) {
  alignas(64) float partials[Heads][kPartials][Width];
  memset(partials, 0, sizeof partials);
  for (int64_t j = 0; j < a.n; ++j) {
#pragma GCC unroll 4
    for (int head = 0; head < Heads; ++head) {
      const float weight = weights[head * a.rows * a.weight_stride + j];
      const T* vector = vectors + head * a.head_stride + j * a.vector_stride;
      float* sums = partials[head][j % kPartials];
      if constexpr (Heads > 1) {
        constexpr int64_t kLine = 64 / sizeof(T);
        const T* fetched = vector + kFetchedVector * a.vector_stride;
        for (int64_t i = 0; i < columns; i += kLine) __builtin_prefetch(fetched + i);
      }
      each_registers<Isa>(columns, [&](int64_t i, auto isa, auto part) {
        using Many = decltype(isa);
        const auto product = Many::mul(Many::set(weight), part.load(vector + i));
        Many::store(sums + i, Many::add_float(Many::load(sums + i), product));
      });
    }
  }
  for (int head = 0; head < Heads; ++head) {
    float* sums = partials[head][0];
    for (int64_t half = kPartials / 2 * Width; half >= Width; half /= 2) {
      each_register<Isa>(half, [&](int64_t i, auto part) {
        part.store(sums + i, Isa::add_float(part.load(sums + i), part.load(sums + half + i)));
      });
    }
    memcpy(out + head * a.rows * a.out_stride, sums, static_cast<size_t>(columns) * sizeof(float));
  }
}

template <class Isa, int Width, int Heads, class T>
inline void weighted_heads(const WeightedSumsArgs& a, int64_t head, const T* vectors) {
  for (int64_t first = 0; first < a.dim; first += Width) {
    const int64_t columns = a.dim - first < Width ? a.dim - first : Width;
    for (int64_t row = 0; row < a.rows; ++row) {
      const int64_t r = head * a.rows + row;
      weighted_strip<Isa, Width, Heads>(a, a.weights + r * a.weight_stride,
                                        vectors + head * a.head_stride + first, columns,
                                        a.out + r * a.out_stride + first);
    }
  }
}

template <class Isa, int Width, class T>
inline void weighted_sums_of(const WeightedSumsArgs& a, const T* vectors) {
  constexpr int kHeads = kSumColumns / Width;
  int64_t head = 0;
  for (; head + kHeads <= a.heads; head += kHeads) {
    weighted_heads<Isa, Width, kHeads>(a, head, vectors);
  }
  for (; head < a.heads; ++head) weighted_heads<Isa, Width, 1>(a, head, vectors);
}

template <class Isa>
void weighted_sums(const WeightedSumsArgs& a) {
  with_type(a.vectors, a.dtype, [&](const auto* vectors) {
    if (a.dim <= kSumColumns / 4) return weighted_sums_of<Isa, kSumColumns / 4>(a, vectors);
    if (a.dim <= kSumColumns / 2) return weighted_sums_of<Isa, kSumColumns / 2>(a, vectors);
    weighted_sums_of<Isa, kSumColumns>(a, vectors);
  });
}

}  // namespace
}  // namespace dynquant
