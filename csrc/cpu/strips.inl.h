// The product of half.inl.h, bit for bit, where a register holds columns of the output and not
// partial sums of one value. For that the weight is laid out anew, which pays from some dozens of
// rows on: then nothing is added across a register, which takes as long as the product where K is
// small, as the features of a head are.
//
// A strip is kStripColumns columns, for each k next to each other. The k of a partial sum follow
// one another, and the partial sums come in the order in which the tree of their sums takes them
// in: so four levels of it, and no more, wait for a partial sum that comes later.
#pragma once

#include "convert.h"
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

// f(the k of the strip's next row, its number in the strip), one partial sum after the other.
template <class F>
inline void each_strip_row(int64_t k, const F& f) {
  int64_t row = 0;
  for (int i = 0; i < kPartials; ++i) {
    for (int64_t at = partial_at(i); at < k; at += kPartials) f(at, row++);
  }
}

template <class Isa>
void lay_strips(const LayStripsArgs& a) {
  with_type_or_int8(a.weight, a.dtype, [&](const auto* weight) {
    for (int64_t first = 0; first < a.n; first += kStripColumns) {
      float* strip = a.strips + first * a.k;
      const int64_t columns = a.n - first < kStripColumns ? a.n - first : kStripColumns;
      if (columns < kStripColumns) memset(strip, 0, sizeof(float) * kStripColumns * a.k);
      const auto* from = weight + first * a.n_stride;
      each_strip_row(a.k, [&](int64_t k, int64_t row) {
        const auto* values = from + k * a.k_stride;
        float* to = strip + row * kStripColumns;
        if (a.n_stride == 1) {
          each_register<Isa>(columns, [&](int64_t i, auto part) {
            Isa::store(to + i, part.load(values + i));
          });
        } else {
          for (int64_t i = 0; i < columns; ++i) to[i] = widen(values[i * a.n_stride]);
        }
      });
    }
  });
}

// Where registers are arrays in memory, several of them gain nothing.
template <class Isa>
constexpr int kStripVectors = __is_class(typename Isa::Float) ? 1 : 2;
template <class Isa>
constexpr int kStripRows = __is_class(typename Isa::Float) ? 1 : Isa::kRegisters >= 32 ? 12 : 6;

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
    strip += (laid - partial_at(i) + kPartials - 1) / kPartials * kStripColumns;
    int level = 0;
    for (; (i >> level & 1) != 0; ++level) {
      each_sum([&](int r, int v) { sum[r][v] = Isa::add_float(waiting[level][r][v], sum[r][v]); });
    }
    if (level < kPartialBits) {
      each_sum([&](int r, int v) { waiting[level][r][v] = sum[r][v]; });
    }
  }
  each_sum([&](int r, int v) {
    Isa::store(out + r * out_stride + v * Isa::kLanes,
               Isa::add_float(sum[r][v], Isa::set(0.0f)));
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
  for (int64_t n = 0; n < a.n; n += kColumns) {
    const float* strip = a.strips + n / kStripColumns * kStripColumns * a.laid_k;
    strip_rows<Isa, kStripRows<Isa>>(a, 0, strip + n % kStripColumns, a.out + n);
  }
}

}  // namespace
}  // namespace dynquant
