// The product of half.inl.h, bit for bit, where a register holds columns of the output and not
// partial sums of one value. For that the weight is laid out anew, which pays from some dozens of
// rows on: then nothing is added across a register, which takes as long as the product where K is
// small, as the features of a head are; and a tile reads few bytes for each product, which counts
// where K is so large that its rows come from the L2 cache.
//
// A strip is kStripColumns columns, for each k next to each other. The k of a partial sum follow
// one another, and the partial sums come in the order in which the tree of their sums takes them
// in: so four levels of it, and no more, wait for a partial sum that comes later.
#pragma once

#include "cache_bytes.h"
#include "half.inl.h"
#include "kernels.h"
#include "layout.h"
#include "quantize.inl.h"
#include "registers.inl.h"
#include "transpose.h"

namespace dynquant {
namespace {

constexpr int kPartialBits = 4;
static_assert(kPartials == 1 << kPartialBits && kPartials == kStripGaps + 1);

// The partial sum that comes as number i: i with its bits reversed.
inline int64_t partial_at(int i) {
  return (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3;
}

// How many of [0, k) a partial sum takes in.
inline int64_t rows_of_partial(int64_t k, int64_t partial) {
  return k / kPartials + (partial < k % kPartials ? 1 : 0);
}

// Where the rows of a strip lie that are k = 0 .. 15 of [0, k): those of k + 16, ... follow.
struct StripRows {
  int64_t first[kPartials];

  inline StripRows(int64_t k, int64_t gap) {
    int64_t row = 0;
    for (int i = 0; i < kPartials; ++i) {
      const int64_t partial = partial_at(i);
      first[partial] = row;
      row += rows_of_partial(k, partial) + gap;
    }
  }
  inline int64_t row(int64_t k) const { return first[k % kPartials] + k / kPartials; }
  inline float* at(float* strip, int64_t k) const { return strip + row(k) * kStripColumns; }
};

// Four values of each of four rows, each column of them to its own place.
inline void transpose_four(const float* from, int64_t stride, float* const (&to)[4]) {
  FourFloats x[4];
  for (int r = 0; r < 4; ++r) x[r] = load_four(from + r * stride);
  transpose_four(x);
  for (int c = 0; c < 4; ++c) store_four(x[c], to[c]);
}

// `columns` rows of W, of k values next to each other, as columns of a strip: so many of both at
// once that a line is read and written once.
template <class Isa, class T>
inline void lay_rows(const T* rows, int64_t stride, int64_t columns, int64_t k,
                     const StripRows& strip_rows, float* strip) {
  constexpr int64_t kColumns = 16, kValues = 32, kTogether = 4;
  alignas(64) float some[kColumns][kValues];
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t count = columns - c < kColumns ? columns - c : kColumns;
    if (count < kColumns) memset(some, 0, sizeof some);
    for (int64_t i = 0; i < k; i += kValues) {
      const int64_t values = k - i < kValues ? k - i : kValues;
      for (int64_t r = 0; r < count; ++r) {
        widen_values<Isa>(rows + (c + r) * stride + i, values, some[r]);
      }
      for (int64_t j = 0; j < values; j += kTogether) {
        float spare[kColumns];
        float* to[kTogether];
        for (int64_t t = 0; t < kTogether; ++t) {
          to[t] = j + t < values ? strip_rows.at(strip, i + j + t) + c : spare;
        }
        for (int64_t r = 0; r < count; r += kTogether) {
          transpose_four(some[r] + j, kValues, {to[0] + r, to[1] + r, to[2] + r, to[3] + r});
        }
      }
    }
  }
}

// The same of `columns` columns of W, which lie next to each other.
template <class Isa, class T>
inline void lay_columns(const T* weight, int64_t stride, int64_t columns, int64_t k,
                        const StripRows& strip_rows, float* strip) {
  for (int64_t i = 0; i < k; ++i) {
    widen_values<Isa>(weight + i * stride, columns, strip_rows.at(strip, i));
  }
}

inline void clear_gaps(int64_t k, const StripRows& strip_rows, float* strip) {
  if (strip_gap_of(k) == 0) return;
  for (int i = 0; i < kPartials - 1; ++i) {
    const int64_t partial = partial_at(i);
    const int64_t gap = strip_rows.first[partial] + rows_of_partial(k, partial);
    memset(strip + gap * kStripColumns, 0, sizeof(float) * kStripColumns);
  }
}

template <class Isa>
void lay_strips(const LayStripsArgs& a) {
  const StripRows strip_rows(a.k, strip_gap_of(a.k));
  const int64_t values = kStripColumns * strip_rows_of(a.k);
  with_type_or_int8(a.weight, a.dtype, [&](const auto* weight) {
    for (int64_t first = 0; first < a.n; first += kStripColumns) {
      float* strip = a.strips + first / kStripColumns * values;
      const int64_t columns = a.n - first < kStripColumns ? a.n - first : kStripColumns;
      if (columns < kStripColumns) {
        memset(strip, 0, sizeof(float) * static_cast<size_t>(values));
      } else {
        clear_gaps(a.k, strip_rows, strip);
      }
      const auto* from = weight + first * a.n_stride;
      if (a.n_stride == 1) {
        lay_columns<Isa>(from, a.k_stride, columns, a.k, strip_rows, strip);
      } else {
        lay_rows<Isa>(from, a.n_stride, columns, a.k, strip_rows, strip);
      }
    }
  });
}

// One row of x in the order of the rows of a strip: four values of each of four partial sums at
// once, as far as there are so many.
template <class Isa, class T>
inline void order_row(const T* x, int64_t k, const StripRows& strip_rows, float* row) {
  constexpr int64_t kTogether = 4, kStep = kTogether * kPartials;
  float some[kStep];
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    for (int64_t s = 0; s < kStep; s += Isa::kLanes) Isa::store(some + s, Isa::load(x + i + s));
    for (int64_t j = 0; j < kPartials; j += kTogether) {
      float* to[kTogether];
      for (int64_t t = 0; t < kTogether; ++t) to[t] = row + strip_rows.row(i + j + t);
      transpose_four(some + j, kPartials, to);
    }
  }
  for (; i < k; ++i) row[strip_rows.row(i)] = widen(x[i]);
}

template <class Isa>
void order_rows(const OrderRowsArgs& a) {
  const StripRows strip_rows(a.k, 0);
  with_type(a.x, a.dtype, [&](const auto* x) {
    for (int64_t m = 0; m < a.m; ++m) {
      order_row<Isa>(x + m * a.x_stride, a.k, strip_rows, a.rows + m * a.stride);
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
// From so many values on a row is better ordered first: the product comes back to each of its lines
// 16 times, and so many rows of a tile outgrow the smallest L1 cache.
template <class Isa>
constexpr int64_t kOrderedFrom =
    kSmallestL1 / static_cast<int64_t>(sizeof(float)) / kStripRows<Isa>;
// From which K on many rows are faster by strips, those of a weight laid out for the call included:
// where a tile of half.inl.h has few rows, for want of registers, and these outgrow the L1 cache.
// On an AMD Zen 4 with AVX2, 64 rows are 1.03 times as fast with K of 2048 and 1.13 with 3072, 512
// rows 1.16 and 1.3; with AVX-512 they are not at any K.
template <class Isa>
constexpr int64_t kStripsFromK =
    __is_class(typename Isa::Float) || Isa::kRegisters >= 32 ? INT64_MAX : 2048;

// R rows by kStripVectors registers of columns.
template <class Isa, bool IsOrdered, int R>
__attribute__((noinline)) void strip_tile(const float* x, int64_t x_stride, int64_t used,
                                          int64_t laid, const float* strip, float* out,
                                          int64_t out_stride) {
  constexpr int V = kStripVectors<Isa>;
  using Float = typename Isa::Float;
  constexpr int64_t kStep = IsOrdered ? 1 : kPartials, kRowsOfStep = kStripColumns / kStep;
  const int64_t gap = strip_gap_of(laid);
  int64_t taken = 0;
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
    const int64_t partial = partial_at(i);
    const int64_t begin = IsOrdered ? taken : partial;
    const int64_t end = IsOrdered ? taken + rows_of_partial(used, partial) : used;
    // One number counts for both operands, which spares the loop additions.
    const float* w = strip - begin * kRowsOfStep;
    for (int64_t k = begin; k < end; k += kStep) {
      Float weight[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) weight[v] = Isa::load(w + k * kRowsOfStep + v * Isa::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Float value = Isa::set(x[r * x_stride + k]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] = Isa::mul_add(value, weight[v], sum[r][v]);
      }
    }
    taken = end;
    strip += (rows_of_partial(laid, partial) + gap) * kStripColumns;
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
template <class Isa, bool IsOrdered, int R>
inline void strip_rows(const StripsGemmArgs& a, int64_t m, const float* strip, float* out) {
  for (; m + R <= a.m; m += R) {
    strip_tile<Isa, IsOrdered, R>(a.x + m * a.x_stride, a.x_stride, a.k, a.laid_k, strip,
                                  out + m * a.out_stride, a.out_stride);
  }
  if constexpr (R > 1) strip_rows<Isa, IsOrdered, R / 2>(a, m, strip, out);
}

template <class Isa, bool IsOrdered>
inline void strips_gemm_of(const StripsGemmArgs& a) {
  constexpr int64_t kColumns = kStripVectors<Isa> * Isa::kLanes;
  static_assert(kStripColumns % kColumns == 0);
  for (int64_t n = 0; n < a.n; n += kColumns) {
    const float* strip = a.strips + n / kStripColumns * kStripColumns * strip_rows_of(a.laid_k);
    strip_rows<Isa, IsOrdered, kStripRows<Isa>>(a, 0, strip + n % kStripColumns, a.out + n);
  }
}

template <class Isa>
void strips_gemm(const StripsGemmArgs& a) {
  if (a.x_is_ordered) return strips_gemm_of<Isa, true>(a);
  strips_gemm_of<Isa, false>(a);
}

}  // namespace
}  // namespace dynquant
