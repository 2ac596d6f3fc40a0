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
// Vectors of each partial sum that are taken together, so that it is seldom read and written. On an
// Intel Ice Lake four rows of AVX-512 are 1.4 to 1.8 times as fast as two rows by four vectors, and
// two rows of AVX2 1.1 times.
constexpr int64_t kDepth = 16;
// The vector that is fetched meanwhile, where heads are side by side.
constexpr int64_t kFetchedVector = 2;
// Vectors of each partial sum that are taken together there: twice as many streams, and a sum is
// read and written half as often. From memory, int8 is 1.04 to 1.06 times as fast on an Intel Ice
// Lake and fp32 level; four are slower.
constexpr int kRounds = 2;

// The partial sums of one row, in rows of their own. One row more, since what 4 KiB lie between
// waits for each other: a load behind a store, as of the same column of another row or head.
template <int Width>
using RowPartials = float[kPartials + 1][Width];

// Partial sums of all rows together that stay in registers (each in four, by each_registers).
template <class Isa>
constexpr int kSumsAtOnce = Isa::kRegisters < 32 ? 2 : 4;

// f(the columns of a strip that is Width wide at most), as a type where they fill it: then they
// need no loop.
template <int Width, class F>
inline void with_columns(int64_t columns, const F& f) {
  if (columns >= Width) return f(Count<Width>());
  f(columns);
}

// Adds `rounds` vectors to each of Sums partial sums of each of Rows rows of weights, which are
// weight_stride and sums_stride apart; sums of one row are sum_stride apart.
template <class Isa, int Rows, int Sums, class T, class Columns>
inline void add_vectors(const float* weights, int64_t weight_stride, const T* vectors,
                        int64_t vector_stride, int64_t rounds, Columns columns, float* sums,
                        int64_t sums_stride, int64_t sum_stride) {
  each_registers<Isa>(columns, [&](int64_t i, auto isa, auto part) {
    using Many = decltype(isa);
    typename Many::Float sum[Rows][Sums];
    const auto each_sum = [&](const auto& f) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < Sums; ++s) f(sum[r][s], sums + r * sums_stride + s * sum_stride + i);
      }
    };
    each_sum([](auto& one, const float* at) { one = Many::load(at); });
#pragma GCC unroll 2
    for (int64_t t = 0; t < rounds * kPartials; t += kPartials) {
#pragma GCC unroll 4
      for (int s = 0; s < Sums; ++s) {
        const auto vector = part.load(vectors + (t + s) * vector_stride + i);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const auto weight = Many::set(weights[r * weight_stride + t + s]);
          sum[r][s] = Many::mul_add(weight, vector, sum[r][s]);
        }
      }
    }
    each_sum([](const auto& one, float* at) { Many::store(at, one); });
  });
}

// The partial sums of one row, of at most Width columns, become its output.
template <class Isa, int Width>
inline void store_sums(const RowPartials<Width>& partials, int64_t columns, float* out) {
  each_register<Isa>(columns, [&](int64_t i, auto part) {
    typename Isa::Float sum[kPartials];
#pragma GCC unroll 16
    for (int p = 0; p < kPartials; ++p) sum[p] = Isa::load(partials[p] + i);
    part.store(out + i, Isa::add_float(sum_by_halves<Isa>(sum), Isa::set(0.0f)));
  });
}

// Rows rows of weights and at most Width columns of the vectors.
template <class Isa, int Width, int Rows, class T, class Columns>
inline void rows_strip(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                       Columns columns, float* out) {
  constexpr int kSums = Rows < kSumsAtOnce<Isa> ? kSumsAtOnce<Isa> / Rows : 1;
  alignas(64) RowPartials<Width> partials[Rows];
  memset(partials, 0, sizeof partials);
  const auto add = [&](int64_t j, int64_t rounds, auto sums) {
    add_vectors<Isa, Rows, sums.kCount>(
        weights + j, a.weight_stride, vectors + j * a.vector_stride, a.vector_stride, rounds,
        columns, partials[0][j % kPartials], sizeof *partials / sizeof(float), Width);
  };
  const int64_t rounds = a.n / kPartials;
  for (int64_t done = 0; done < rounds; done += kDepth) {
    const int64_t count = rounds - done < kDepth ? rounds - done : kDepth;
    for (int64_t p = 0; p < kPartials; p += kSums) {
      add(done * kPartials + p, count, Count<kSums>());
    }
  }
  for (int64_t j = rounds * kPartials; j < a.n; ++j) add(j, 1, Count<1>());
  for (int r = 0; r < Rows; ++r) store_sums<Isa>(partials[r], columns, out + r * a.out_stride);
}

// One row of weights of each of Heads heads, whose vectors have at most Width columns and are read
// nearly in the order in which they lie in memory, kRounds vectors of each head in turn: several
// streams (far.inl.h). Four heads with one vector each are 1.2 to 1.4 times as fast on an AMD Zen 3
// as one after the other; from a cache, 0.8 to 0.9 times.
template <class Isa, int Width, int Heads, class T, class Columns>
inline void heads_strip(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                        Columns columns, float* out) {
  alignas(64) RowPartials<Width> partials[Heads];
  memset(partials, 0, sizeof partials);
  const auto add = [&](int64_t j, auto rounds) {
#pragma GCC unroll 4
    for (int head = 0; head < Heads; ++head) {
      constexpr int64_t kValues = kLine / sizeof(T);
      const T* vector = vectors + head * a.head_stride + j * a.vector_stride;
      for (int64_t t = 0; t < rounds * kPartials; t += kPartials) {
        const T* fetched = vector + (t + kFetchedVector) * a.vector_stride;
        for (int64_t i = 0; i < columns; i += kValues) __builtin_prefetch(fetched + i);
      }
      add_vectors<Isa, 1, 1>(weights + head * a.rows * a.weight_stride + j, 0, vector,
                             a.vector_stride, rounds.kCount, columns, partials[head][j % kPartials],
                             0, 0);
    }
  };
  int64_t j = 0;
  for (; j + kRounds * kPartials <= a.n; j += kRounds * kPartials) {
    for (int64_t p = 0; p < kPartials; ++p) add(j + p, Count<kRounds>());
  }
  for (; j < a.n; ++j) add(j, Count<1>());
  for (int head = 0; head < Heads; ++head) {
    store_sums<Isa>(partials[head], columns, out + head * a.rows * a.out_stride);
  }
}

// Rows rows of one head, in strips of at most Widest columns.
template <class Isa, int Widest, int Rows, class T>
inline void rows_of_head(const WeightedSumsArgs& a, const float* weights, const T* vectors,
                         float* out) {
  constexpr int kShare = kSumColumns / (Rows > 2 ? 4 : Rows);
  constexpr int kWidth = kShare < Widest ? kShare : Widest;
  for (int64_t first = 0; first < a.dim; first += kWidth) {
    with_columns<kWidth>(a.dim - first, [&](auto columns) {
      rows_strip<Isa, kWidth, Rows>(a, weights, vectors + first, columns, out + first);
    });
  }
}

template <class Isa, int Heads, class T>
inline void weighted_sums_of(const WeightedSumsArgs& a, const T* vectors) {
  constexpr int kWidest = kSumColumns / Heads;
  // f(its weights, vectors and outputs) for a row of a head
  const auto with = [&](int64_t head, int64_t row, const auto& f) {
    const int64_t r = head * a.rows + row;
    f(a.weights + r * a.weight_stride, vectors + head * a.head_stride, a.out + r * a.out_stride);
  };
  int64_t head = 0;
  if constexpr (Heads > 1) {
    for (; head + Heads <= a.heads; head += Heads) {
      for (int64_t row = 0; row < a.rows; ++row) {
        with(head, row, [&](const float* weights, const T* of, float* out) {
          with_columns<kWidest>(a.dim, [&](auto columns) {
            heads_strip<Isa, kWidest, Heads>(a, weights, of, columns, out);
          });
        });
      }
    }
  }
  constexpr int kRows = kSumsAtOnce<Isa>;
  for (; head < a.heads; ++head) {
    for (int64_t row = 0; row < a.rows; row += kRows) {
      with_count<kRows>(a.rows - row < kRows ? a.rows - row : kRows, [&](auto count) {
        with(head, row, [&](auto... of) { rows_of_head<Isa, kWidest, count.kCount>(a, of...); });
      });
    }
  }
}

template <class Isa>
void weighted_sums(const WeightedSumsArgs& a) {
  with_type_or_int8(a.vectors, a.dtype, [&](const auto* vectors) {
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
