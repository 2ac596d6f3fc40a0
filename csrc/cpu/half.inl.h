// The product of fp32 rows and a weight in 16 bits (or fp32, or int8) as it lies in memory, W[N, K]
// row by row, written once over an `Isa` type.
//
// Each output is a sum of 16 partial sums, which begin at 0: partial j takes in the products of
// k = j, j + 16, ... in that order, each by one fused multiply-add, and then j takes in j + 8,
// j + 4, j + 2, j + 1, and at last 0. The order depends on K alone, so the bits are the same on
// every instruction set, for every tile and in every batch. No sum is -0, and so products of which
// a factor is 0 may be left out. (Where products and sums go to the same ports, as those of an
// Intel Ice Lake, many rows are 1.6 times as fast as with two roundings.)
//
// A tile is R rows of x by V rows of W, each pair with its 16 partial sums in registers. One row of
// x streams through V rows of W at once, which hides the latency of the sums.
//
// A strip of columns comes from several places of W, a row of each in turn: several streams
// (far.inl.h). On an AMD Zen 3 one row of x is 1.2 to 2.2 times as fast by that where W comes from
// memory, and level where it comes from a cache.
#pragma once

#include "cache_bytes.h"
#include "convert.h"
#include "kernels.h"
#include "layout.h"
#include "quantize.inl.h"

namespace dynquant {
namespace {

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

constexpr int64_t kHalfColumns = 64;  // outputs of a strip that wait for bias and rounding together

// The places of W that a strip comes from, and the rows of each.
template <class Isa>
constexpr int kPlaces = half_vectors<Isa>(1) < kHalfColumns / Isa::kLanes
                            ? half_vectors<Isa>(1)
                            : static_cast<int>(kHalfColumns) / Isa::kLanes;
template <class Isa>
constexpr int kRowsOfPlace = static_cast<int>(kHalfColumns) / kPlaces<Isa>;

// Whether one row of x takes one row of W from each place at once, and has fetched what lies a
// little further on in them. Else it takes as many as registers have room for, and has the rows of
// the next tile fetched, which fill an L1 cache of 32 KB: on an AMD Zen 4 the former is 1.15
// to 1.75 times as fast from the L3 cache and from memory, with AVX-512 and with AVX2, and level
// from the L2 cache. With a larger L1 cache it is not measured; int8 weights gain there by more
// streams, fetched further ahead (far.inl.h). Rows of few lines fit in any, and need not follow one
// another in memory, as the keys of a head do not.
constexpr int64_t kFewValues = 256;
inline bool reads_along_rows(int64_t k) { return k > kFewValues && l1_bytes() <= kSmallestL1; }

// How many values further on one row of x has something of W fetched; `next` is how far the next
// tile is.
template <class T>
inline int64_t ahead_in_rows(int64_t k, int64_t next) {
  constexpr int64_t kLines = 4;
  return reads_along_rows(k) ? kLines * kLine / static_cast<int64_t>(sizeof(T)) : next;
}

// Rows of W in a tile: place by place where there are several, one after the other where not.
template <class Isa, bool InPlaces, int V>
struct RowsOfTile {
  static constexpr int kPlacesInUse = InPlaces ? kPlaces<Isa> : 1;
  static constexpr int kOfPlace = V > kPlacesInUse ? V / kPlacesInUse : 1;  // to the next tile

  // From the first row to row v.
  static inline int64_t at(int v, int64_t place, int64_t stride) {
    return v % kPlacesInUse * place + v / kPlacesInUse * stride;
  }
  static inline int64_t sum_at(int v) { return at(v, kRowsOfPlace<Isa>, 1); }
};

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

  // What so many products take, loaded once.
  template <int Products, class T>
  static inline typename Isa::Float load_for(const T* p) {
    const typename Isa::Float values = Isa::load(p);
    return Products > 1 ? Isa::in_register(values) : values;
  }

  // Takes in 16 values of each row; row v of W begins at w + at(v).
  template <class T, class At>
  inline void add(const float* x, int64_t x_stride, const T* w, const At& at) {
#pragma GCC unroll 64
    for (int p = 0; p < P; ++p) {
      const int64_t i = p * Isa::kLanes;
      typename Isa::Float weight[V];
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) weight[v] = load_for<R>(w + at(v) + i);
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
        const typename Isa::Float value = load_for<V>(x + r * x_stride + i);
#pragma GCC unroll 64
        for (int v = 0; v < V; ++v) {
          sum[r][v][p] = Isa::mul_add(value, weight[v], sum[r][v][p]);
        }
      }
    }
  }

  static constexpr int kSums = R * V;
  // Room for the sums of all, by whole registers.
  static constexpr int kTotals = (kSums + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes;

  // The sum of row r and row v of W becomes number r * V + v. As many at once as a register has
  // lanes, where more than half of these are used: that takes 3 instructions for each, not 6 to 8.
  inline void total(float (&totals)[kTotals]) {
    constexpr int kLanes = Isa::kLanes, kRest = kSums % kLanes;
    constexpr int kTogether = kRest * 2 > kLanes ? kTotals : kSums - kRest;
#pragma GCC unroll 64
    for (int first = 0; first < kTogether; first += kLanes) {
      typename Isa::Float some[kLanes];
#pragma GCC unroll 64
      for (int i = 0; i < kLanes; ++i) {
        some[i] = first + i < kSums ? join(first + i) : some[0];
      }
      Isa::store(totals + first, Isa::reduce_adds(some));
    }
#pragma GCC unroll 64
    for (int i = kTogether; i < kSums; ++i) totals[i] = Isa::reduce_add(join(i));
  }

  // Brings the partial sums of a pair into one register.
  inline typename Isa::Float join(int pair) { return sum_by_halves<Isa>(sum[pair / V][pair % V]); }
};

// The last values of a row, filled up to 16 with zeros.
template <class T>
inline void copy_tail(const T* from, int64_t count, T* to) {
  memset(to, 0, kPartials * sizeof(T));
  memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class Isa, int R, int V, bool InPlaces, class T>
__attribute__((noinline)) void half_tile(const float* x, int64_t x_stride, int64_t k, const T* w,
                                         int64_t w_stride, int64_t place, int64_t ahead,
                                         float* sums) {
  using Tile = RowsOfTile<Isa, InPlaces, V>;
  const auto at = [&](int v) { return Tile::at(v, place, w_stride); };
  Partials<Isa, R, V> partials;
  partials.clear();
  int64_t i = 0;
  for (; i + kPartials <= k; i += kPartials) {
    // One row of x is done with its weights too soon for the processor to have seen where each row
    // goes.
    if constexpr (R == 1) {
#pragma GCC unroll 64
      for (int v = 0; v < V; ++v) __builtin_prefetch(w + at(v) + ahead + i);
    }
    partials.add(x + i, x_stride, w + i, at);
  }
  if (i < k) {
    float x_tail[R * kPartials];
    T w_tail[V * kPartials];
    for (int r = 0; r < R; ++r) copy_tail(x + r * x_stride + i, k - i, x_tail + r * kPartials);
    for (int v = 0; v < V; ++v) copy_tail(w + at(v) + i, k - i, w_tail + v * kPartials);
    partials.add(x_tail, kPartials, w_tail, [](int v) { return v * kPartials; });
  }
  float totals[Partials<Isa, R, V>::kTotals];
  partials.total(totals);
#pragma GCC unroll 64
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) sums[r * kHalfColumns + Tile::sum_at(v)] = totals[r * V + v];
  }
}

// Adds 0 and the bias to one row of at most kHalfColumns sums and stores it as T.
template <class Isa, class T>
inline void finish_half(const float* sums, const float* bias, int64_t columns, T* out) {
  each_register<Isa>(columns, [&](int64_t c, auto part) {
    typename Isa::Float sum = Isa::add_float(part.load(sums + c), Isa::set(0.0f));
    if (bias != nullptr) sum = Isa::add_float(sum, part.load(bias + c));
    part.store(out + c, sum);
  });
}

template <class Isa, int R, int V, class T>
inline void tiles_of_strip(const HalfGemmArgs& a, const float* x, const T* w, int64_t place,
                           float* sums) {
  constexpr int kTilePlaces = V < kPlaces<Isa> ? V : kPlaces<Isa>;
  const int64_t next = RowsOfTile<Isa, true, V>::kOfPlace * a.weight_stride;
  const int64_t ahead = R == 1 ? ahead_in_rows<T>(a.k, next) : 0;
  for (int64_t c = 0; c < kRowsOfPlace<Isa>; c += V / kTilePlaces) {
    for (int64_t p = 0; p < kPlaces<Isa>; p += kTilePlaces) {
      half_tile<Isa, R, V, true>(x, a.x_stride, a.k, w + p * place + c * a.weight_stride,
                                 a.weight_stride, place, ahead, sums + p * kRowsOfPlace<Isa> + c);
    }
  }
}

// One row of x and a whole strip of rows of W that have Steps times 16 values. Their sums wait for
// being taken across the lanes together. For rows so short, that and finding where they lie takes
// longer in a tile than the products: on an Intel Ice Lake, 64 values in int8 are 1.3 times as fast
// like this from a cache and 1.2 times from memory; on other processors it is not measured. Longer
// rows are level or a little slower.
template <class Isa, int Steps, class T>
__attribute__((noinline)) void short_strip(const float* x, const T* w, int64_t w_stride,
                                           int64_t place, float* sums) {
  constexpr int kLanes = Isa::kLanes;
  constexpr int64_t kAhead = 4, kValues = kLine / sizeof(T);
  alignas(64) float joined[kHalfColumns][kLanes];
  for (int r = 0; r < kRowsOfPlace<Isa>; ++r, w += w_stride) {
#pragma GCC unroll 8
    for (int p = 0; p < kPlaces<Isa>; ++p) {
      const T* row = w + p * place;
#pragma GCC unroll 2
      for (int64_t i = 0; i < Steps * kPartials; i += kValues) {
        __builtin_prefetch(row + kAhead * w_stride + i);
      }
      Partials<Isa, 1, 1> partials;
      partials.clear();
#pragma GCC unroll 8
      for (int64_t i = 0; i < Steps * kPartials; i += kPartials) {
        partials.add(x + i, 0, row + i, [](int) { return 0; });
      }
      Isa::store(joined[p * kRowsOfPlace<Isa> + r], partials.join(0));
    }
  }
  for (int64_t c = 0; c < kHalfColumns; c += kLanes) {
    typename Isa::Float some[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) some[i] = Isa::load(joined[c + i]);
    Isa::store(sums + c, Isa::reduce_adds(some));
  }
}

// R rows of x and a whole strip, whose places are `place` values apart.
template <class Isa, int R, class T>
inline void half_strip(const HalfGemmArgs& a, const float* x, const T* w, int64_t place,
                       float* sums) {
  constexpr int kMostSteps = 2 * kLine / (kPartials * sizeof(T));  // of rows of two lines
  constexpr int V = half_vectors<Isa>(R);
  if constexpr (R == 1) {
    if (a.k > 0 && a.k % kPartials == 0 && a.k <= kMostSteps * kPartials) {
      return with_count<kMostSteps>(a.k / kPartials, [&](auto steps) {
        short_strip<Isa, steps.kCount>(x, w, a.weight_stride, place, sums);
      });
    }
    constexpr int kOfPlaces = V < kPlaces<Isa> ? V : kPlaces<Isa>;
    if (reads_along_rows(a.k)) return tiles_of_strip<Isa, 1, kOfPlaces>(a, x, w, place, sums);
  }
  tiles_of_strip<Isa, R, V>(a, x, w, place, sums);
}

// R rows of x and the last columns of W, fewer than a strip has, in tiles of V and fewer.
template <class Isa, int R, int V, class T>
inline void half_rest(const HalfGemmArgs& a, const float* x, const T* w, int64_t columns,
                      float* sums) {
  const int64_t stride = a.weight_stride, ahead = R == 1 ? ahead_in_rows<T>(a.k, V * stride) : 0;
  int64_t c = 0;
  for (; c + V <= columns; c += V) {
    half_tile<Isa, R, V, false>(x, a.x_stride, a.k, w + c * stride, stride, 0, ahead, sums + c);
  }
  if constexpr (V > 1) {
    if (c < columns) half_rest<Isa, R, V / 2>(a, x, w + c * stride, columns - c, sums + c);
  }
}

template <class Isa, class T>
inline void half_gemm_of(const HalfGemmArgs& a, const T* weight) {
  const int64_t strips = (a.n_end - a.n_begin) / kHalfColumns;
  const int64_t place = strips * kRowsOfPlace<Isa>;  // rows of W
  const int64_t blocks = ceil_div(a.m, kHalfRows<Isa>);
  const auto finish = [&](const float* sums, int64_t row, int64_t n, int64_t columns) {
    const float* bias = a.bias == nullptr ? nullptr : a.bias + n;
    with_output(a.out, a.out_dtype, row * a.out_stride + n,
                [&](auto* out) { finish_half<Isa>(sums, bias, columns, out); });
  };
  // f(the first of some rows of x, how many)
  const auto each_rows_of_x = [&](const auto& f) {
    int64_t m = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t rows = a.m / blocks + (b < a.m % blocks ? 1 : 0);
      with_count<kHalfRows<Isa>>(rows, [&](auto of_x) { f(m, of_x); });
      m += rows;
    }
  };
  float sums[kHalfRows<Isa> * kHalfColumns];
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t n = a.n_begin + s * kRowsOfPlace<Isa>;
    each_rows_of_x([&](int64_t m, auto of_x) {
      constexpr int kCount = of_x.kCount;
      half_strip<Isa, kCount>(a, a.x + m * a.x_stride, weight + n * a.weight_stride,
                              place * a.weight_stride, sums);
      for (int64_t r = 0; r < kCount; ++r) {
        for (int64_t p = 0; p < kPlaces<Isa>; ++p) {
          finish(sums + r * kHalfColumns + p * kRowsOfPlace<Isa>, m + r, n + p * place,
                 kRowsOfPlace<Isa>);
        }
      }
    });
  }
  const int64_t n = a.n_begin + strips * kHalfColumns;
  if (n == a.n_end) return;
  each_rows_of_x([&](int64_t m, auto of_x) {
    constexpr int kCount = of_x.kCount;
    half_rest<Isa, kCount, half_vectors<Isa>(kCount)>(
        a, a.x + m * a.x_stride, weight + n * a.weight_stride, a.n_end - n, sums);
    for (int64_t r = 0; r < kCount; ++r) {
      finish(sums + r * kHalfColumns, m + r, n, a.n_end - n);
    }
  });
}

template <class Isa>
void half_gemm(const HalfGemmArgs& a) {
  with_type_or_int8(a.weight, a.weight_dtype,
                    [&](const auto* weight) { half_gemm_of<Isa>(a, weight); });
}

template <class Isa>
void finish_half_rows(const FinishHalfArgs& a) {
  for (int64_t m = 0; m < a.m; ++m) {
    with_output(a.out, a.out_dtype, m * a.out_stride,
                [&](auto* out) { finish_half<Isa>(a.sums + m * a.stride, a.bias, a.n, out); });
  }
}

template <class Isa, class T>
inline void widen_values(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) Isa::store(out + i, Isa::load(x + i));
  for (; i < count; ++i) out[i] = widen(x[i]);
}

template <class Isa>
void widen_row(const void* x, Dtype dtype, int64_t k, float* out) {
  with_type_or_int8(x, dtype, [&](const auto* typed) { widen_values<Isa>(typed, k, out); });
}

template <class Isa>
void narrow_row(const float* x, int64_t k, Dtype dtype, void* out) {
  with_output(out, dtype, 0, [&](auto* typed) {
    each_register<Isa>(k, [&](int64_t i, auto part) { part.store(typed + i, part.load(x + i)); });
  });
}

}  // namespace
}  // namespace dynquant
