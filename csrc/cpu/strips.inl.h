// The product of half.inl.h, bit for bit, where a register holds columns of the output and not
// partial sums of one value. For that the weight is laid out anew, which pays from some dozens of
// rows on: then nothing is added across a register, which takes as long as the product where K is
// small, as the features of a head are.
//
// A strip is kStripColumns columns, for each k next to each other. The k of a partial sum follow
// one another, and the partial sums come in the order in which the tree of their sums takes them
// in: so four levels of it, and no more, wait for a partial sum that comes later.
#pragma once

#include "half.inl.h"
#include "kernels.h"
#include "layout.h"
#include "quantize.inl.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

constexpr int kPartialBits = 4;
static_assert(kPartials == 1 << kPartialBits);

// The partial sum that comes as number i: i with its bits reversed.
inline int64_t partial_at(int i) {
  return (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3;
}

// How many of [0, k) a partial sum takes in.
inline int64_t rows_of_partial(int64_t k, int64_t partial) {
  return k <= partial ? 0 : ceil_div(k - partial, kPartials);
}

// Where the rows of a strip lie that are k = 0 .. 15 of [0, k): those of k + 16, ... follow.
struct StripRows {
  int64_t first[kPartials];

  explicit inline StripRows(int64_t k) {
    int64_t row = 0;
    for (int i = 0; i < kPartials; ++i) {
      const int64_t partial = partial_at(i);
      first[partial] = row;
      row += rows_of_partial(k, partial);
    }
  }
  inline float* at(float* strip, int64_t k) const {
    return strip + (first[k % kPartials] + k / kPartials) * kStripColumns;
  }
};

// Four values of each of four rows, a column of them after the other.
typedef float FourFloats __attribute__((vector_size(16)));
inline void transpose_four(const float* from, int64_t stride, float* const (&to)[4]) {
  FourFloats row[4];
  for (int r = 0; r < 4; ++r) memcpy(&row[r], from + r * stride, sizeof row[r]);
  const FourFloats low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const FourFloats low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const FourFloats high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const FourFloats high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const FourFloats column[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                                __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                                __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                                __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int c = 0; c < 4; ++c) memcpy(to[c], &column[c], sizeof column[c]);
}

// `columns` rows of W, of k values next to each other, as columns of a strip.
template <class Isa, class T>
inline void lay_rows(const T* rows, int64_t stride, int64_t columns, int64_t k, float* strip) {
  const StripRows strip_rows(k);
  constexpr int64_t kTogether = 4;
  float some[kTogether][kPartials];
  for (int64_t c = 0; c < columns; c += kTogether) {
    const int64_t count = columns - c < kTogether ? columns - c : kTogether;
    if (count < kTogether) memset(some, 0, sizeof some);
    for (int64_t i = 0; i < k; i += kPartials) {
      const int64_t values = k - i < kPartials ? k - i : kPartials;
      for (int64_t r = 0; r < count; ++r) {
        widen_values<Isa>(rows + (c + r) * stride + i, values, some[r]);
      }
      for (int64_t j = 0; j < values; j += kTogether) {
        float spare[kTogether];
        float* to[kTogether];
        for (int64_t t = 0; t < kTogether; ++t) {
          to[t] = j + t < values ? strip_rows.at(strip, i + j + t) + c : spare;
        }
        transpose_four(some[0] + j, kPartials, to);
      }
    }
  }
}

// The same of `columns` columns of W, which lie next to each other.
template <class Isa, class T>
inline void lay_columns(const T* weight, int64_t stride, int64_t columns, int64_t k, float* strip) {
  const StripRows strip_rows(k);
  for (int64_t i = 0; i < k; ++i) {
    widen_values<Isa>(weight + i * stride, columns, strip_rows.at(strip, i));
  }
}

template <class Isa>
void lay_strips(const LayStripsArgs& a) {
  with_type_or_int8(a.weight, a.dtype, [&](const auto* weight) {
    for (int64_t first = 0; first < a.n; first += kStripColumns) {
      float* strip = a.strips + first * a.k;
      const int64_t columns = a.n - first < kStripColumns ? a.n - first : kStripColumns;
      const size_t bytes = sizeof(float) * static_cast<size_t>(kStripColumns * a.k);
      if (columns < kStripColumns) memset(strip, 0, bytes);
      const auto* from = weight + first * a.n_stride;
      if (a.n_stride == 1) {
        lay_columns<Isa>(from, a.k_stride, columns, a.k, strip);
      } else {
        lay_rows<Isa>(from, a.n_stride, columns, a.k, strip);
      }
    }
  });
}

// Where registers are arrays in memory, several of them gain nothing.
template <class Isa>
constexpr int kStripVectors = __is_class(typename Isa::Float) ? 1 : 2;
template <class Isa>
constexpr int kStripRows = __is_class(typename Isa::Float) ? 1
                           : Isa::kRegisters >= 32         ? 12
                                                           : 6;

// R rows by kStripVectors registers of columns.
template <class Isa, int R>
__attribute__((noinline)) void strip_tile(const float* x, int64_t x_stride, int64_t used,
                                          int64_t laid, const float* strip, float* out,
                                          int64_t out_stride) {
  constexpr int V = kStripVectors<Isa>;
  using Float = typename Isa::Float;
  Float sum[R][V], waiting[kPartialBits][R][V];
  const auto each_sum = [&](const auto& f) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) f(r, v);
    }
  };
  for (int i = 0; i < kPartials; ++i) {
    each_sum([&](int r, int v) { sum[r][v] = Isa::set(0.0f); });
    const float* w = strip;
    for (int64_t k = partial_at(i); k < used; k += kPartials, w += kStripColumns) {
      Float weight[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weight[v] = Isa::load(w + v * Isa::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Float value = Isa::set(x[r * x_stride + k]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = Isa::mul_add(value, weight[v], sum[r][v]);
      }
    }
    strip += rows_of_partial(laid, partial_at(i)) * kStripColumns;
    int level = 0;
    for (; (i >> level & 1) != 0; ++level) {
      each_sum([&](int r, int v) { sum[r][v] = Isa::add_float(waiting[level][r][v], sum[r][v]); });
    }
    if (level < kPartialBits) {
      each_sum([&](int r, int v) { waiting[level][r][v] = sum[r][v]; });
    }
  }
  each_sum([&](int r, int v) {
    Isa::store(out + r * out_stride + v * Isa::kLanes, Isa::add_float(sum[r][v], Isa::set(0.0f)));
  });
}

// The rows from m on, R at once as far as there are so many, and half as many of what is left.
template <class Isa, int R>
inline void strip_rows(const StripsGemmArgs& a, int64_t m, const float* strip, float* out) {
  for (; m + R <= a.m; m += R) {
    strip_tile<Isa, R>(a.x + m * a.x_stride, a.x_stride, a.k, a.laid_k, strip,
                       out + m * a.out_stride, a.out_stride);
  }
  if constexpr (R > 1) strip_rows<Isa, R / 2>(a, m, strip, out);
}

template <class Isa>
void strips_gemm(const StripsGemmArgs& a) {
  constexpr int64_t kColumns = kStripVectors<Isa> * Isa::kLanes;
  static_assert(kStripColumns % kColumns == 0);
  for (int64_t n = 0; n < a.n; n += kColumns) {
    const float* strip = a.strips + n / kStripColumns * kStripColumns * a.laid_k;
    strip_rows<Isa, kStripRows<Isa>>(a, 0, strip + n % kStripColumns, a.out + n);
  }
}

}  // namespace
}  // namespace dynquant
