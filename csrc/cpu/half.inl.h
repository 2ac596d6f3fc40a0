// The product of fp32 rows and a weight in 16 bits (or fp32) as it lies in memory, W[N, K] row by
// row, written once over an `Isa` type.
//
// Each output is a sum of 16 partial sums: partial j takes the products of k = j, j + 16, ... in
// that order, and then j takes in j + 8, j + 4, j + 2, j + 1. Every product and every sum is
// rounded on its own. The order depends on K alone, so the bits are the same on every instruction
// set, for every tile and in every batch. (No FMA: where a processor multiplies and adds on
// separate ports it gains nothing, and where memory is the limit nothing can be gained.)
//
// A tile is R rows of x by V rows of W, each pair with its 16 partial sums in registers. One row of
// x streams through V rows of W at once, which hides the latency of the sums.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "layout.h"
#include "quantize.inl.h"

namespace dynquant {
namespace {

constexpr int64_t kHalfColumns = 64;  // outputs of a strip that wait for bias and rounding together

// Registers for the sums of a pair of rows, and how many pairs three quarters of all registers have
// room for.
template <class Isa>
constexpr int kPairRegisters = kPartials / Isa::kLanes;
template <class Isa>
constexpr int kPairs =
    Isa::kRegisters * 3 / 4 < kPairRegisters<Isa> ? 1
                                                  : Isa::kRegisters * 3 / 4 / kPairRegisters<Isa>;
template <class Isa>
constexpr int kHalfRows = kPairs<Isa> >= 24  ? 6
                          : kPairs<Isa> >= 6 ? 3
                                             : 1;

template <class Isa>
constexpr int half_vectors(int rows) {
  int vectors = 8;
  while (vectors > 1 && vectors * rows > kPairs<Isa>) vectors /= 2;
  return vectors;
}

// The 16 partial sums of every pair in a tile.
template <class Isa, int R, int V>
struct Partials {
  static constexpr int P = kPairRegisters<Isa>;
  typename Isa::Float sum[R][V][P];

  inline void clear() {
#pragma GCC unroll 64
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) {
#pragma GCC unroll 64
        for (int p = 0; p < P; ++p) sum[r][v][p] = Isa::set(0.0f);
      }
    }
  }

  // Takes in 16 values of each row.
  template <class T>
  inline void add(const float* x, int64_t x_stride, const T* w, int64_t w_stride) {
#pragma GCC unroll 64
    for (int p = 0; p < P; ++p) {
      const int64_t i = p * Isa::kLanes;
      typename Isa::Float weight[V];
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) weight[v] = Isa::load(w + v * w_stride + i);
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
        const typename Isa::Float value = Isa::load(x + r * x_stride + i);
#pragma GCC unroll 64
        for (int v = 0; v < V; ++v) {
          sum[r][v][p] = Isa::add_float(sum[r][v][p], Isa::mul(value, weight[v]));
        }
      }
    }
  }

  inline float total(int r, int v) {
#pragma GCC unroll 64
    for (int step = P / 2; step > 0; step /= 2) {
#pragma GCC unroll 64
      for (int p = 0; p < step; ++p) {
        sum[r][v][p] = Isa::add_float(sum[r][v][p], sum[r][v][p + step]);
      }
    }
    return Isa::reduce_add(sum[r][v][0]);
  }
};

// The last values of `rows` rows, filled up to 16 with zeros.
template <class T>
inline void copy_tails(const T* from, int64_t stride, int rows, int64_t count, T* to) {
  memset(to, 0, static_cast<size_t>(rows) * kPartials * sizeof(T));
  for (int r = 0; r < rows; ++r) {
    memcpy(to + r * kPartials, from + r * stride, static_cast<size_t>(count) * sizeof(T));
  }
}

template <class Isa, int R, int V, class T>
__attribute__((noinline)) void half_tile(const float* x, int64_t x_stride, const T* w,
                                         int64_t w_stride, int64_t k, float* sums) {
  Partials<Isa, R, V> partials;
  partials.clear();
  int64_t i = 0;
  for (; i + kPartials <= k; i += kPartials) {
    // The rows of the next tile: one row of x is done with its weights too soon for the processor
    // to have seen where each row goes.
    if constexpr (R == 1) {
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) __builtin_prefetch(w + (V + v) * w_stride + i);
    }
    partials.add(x + i, x_stride, w + i, w_stride);
  }
  if (i < k) {
    float x_tail[R * kPartials];
    T w_tail[V * kPartials];
    copy_tails(x + i, x_stride, R, k - i, x_tail);
    copy_tails(w + i, w_stride, V, k - i, w_tail);
    partials.add(x_tail, kPartials, w_tail, kPartials);
  }
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) sums[r * kHalfColumns + v] = partials.total(r, v);
  }
}

// Adds the bias to one row of at most kHalfColumns sums and stores it as T.
template <class Isa, class T>
inline void finish_half(const float* sums, const float* bias, int64_t columns, T* out) {
  // -0 is the one value whose sum with any y is y.
  const typename Isa::Float none = Isa::set(-0.0f);
  int64_t c = 0;
  for (; c + Isa::kLanes <= columns; c += Isa::kLanes) {
    Isa::store(out + c,
               Isa::add_float(Isa::load(sums + c), bias == nullptr ? none : Isa::load(bias + c)));
  }
  if (c == columns) return;
  T tail[Isa::kLanes];
  const typename Isa::Float added = bias == nullptr ? none : load_part<Isa>(bias + c, columns - c);
  Isa::store(tail, Isa::add_float(load_part<Isa>(sums + c, columns - c), added));
  memcpy(out + c, tail, static_cast<size_t>(columns - c) * sizeof(T));
}

template <class Isa, int R, class T>
inline void half_strip(const HalfGemmArgs& a, const float* x, int64_t n0, int64_t columns,
                       float* sums) {
  constexpr int V = half_vectors<Isa>(R);
  const T* w = static_cast<const T*>(a.weight) + n0 * a.weight_stride;
  int64_t c = 0;
  for (; c + V <= columns; c += V) {
    half_tile<Isa, R, V>(x, a.x_stride, w + c * a.weight_stride, a.weight_stride, a.k, sums + c);
  }
  for (; c < columns; ++c) {
    half_tile<Isa, R, 1>(x, a.x_stride, w + c * a.weight_stride, a.weight_stride, a.k, sums + c);
  }
}

template <class Isa, int R, class T>
inline void half_strip_of(int64_t rows, const HalfGemmArgs& a, const float* x, int64_t n0,
                          int64_t columns, float* sums) {
  if (rows == R) return half_strip<Isa, R, T>(a, x, n0, columns, sums);
  if constexpr (R > 1) return half_strip_of<Isa, R - 1, T>(rows, a, x, n0, columns, sums);
}

template <class Isa, class T>
inline void half_gemm_of(const HalfGemmArgs& a, const T*) {
  const int64_t strips = ceil_div(a.m, kHalfRows<Isa>);
  for (int64_t n0 = a.n_begin; n0 < a.n_end; n0 += kHalfColumns) {
    const int64_t columns = a.n_end - n0 < kHalfColumns ? a.n_end - n0 : kHalfColumns;
    const float* bias = a.bias == nullptr ? nullptr : a.bias + n0;
    int64_t m0 = 0;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t rows = a.m / strips + (s < a.m % strips ? 1 : 0);
      float sums[kHalfRows<Isa> * kHalfColumns];
      half_strip_of<Isa, kHalfRows<Isa>, T>(rows, a, a.x + m0 * a.x_stride, n0, columns, sums);
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = sums + r * kHalfColumns;
        with_output(a.out, a.out_dtype, (m0 + r) * a.out_stride + n0,
                    [&](auto* out) { finish_half<Isa>(row, bias, columns, out); });
      }
      m0 += rows;
    }
  }
}

template <class Isa>
void half_gemm(const HalfGemmArgs& a) {
  with_type(a.weight, a.weight_dtype, [&](const auto* weight) { half_gemm_of<Isa>(a, weight); });
}

template <class Isa>
void widen_row(const void* x, Dtype dtype, int64_t k, float* out) {
  with_type(x, dtype, [&](const auto* typed) {
    int64_t i = 0;
    for (; i + Isa::kLanes <= k; i += Isa::kLanes) Isa::store(out + i, Isa::load(typed + i));
    for (; i < k; ++i) out[i] = widen(typed[i]);
  });
}

}  // namespace
}  // namespace dynquant
