// Embedding tables whose rows are quantized each with its own scale and offset, and sums over their
// rows, written once over an `Isa` type.
//
// A row of `dim` values is `dim` bytes, or half as many where two values share one: the first of
// them in the lower four bits. Value d of row r is float(q) * scale[r] + offset[r], each step
// rounded on its own.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "layout.h"
#include "quantize.inl.h"

namespace dynquant {
namespace {

constexpr float kLeastScale = 0x1p-126f;

// The least and the greatest value of a row; false where it holds NaN or their difference is
// not finite.
template <class Isa, class T>
inline bool extremes(const T* x, int64_t dim, float* lo, float* hi) {
  typename Isa::Float least = Isa::set(widen(x[0])), greatest = least;
  typename Isa::Mask nan = Isa::is_nan(least);
  int64_t d = 0;
  const auto take = [&](typename Isa::Float value) {
    least = Isa::min(value, least);
    greatest = Isa::max(value, greatest);
    nan = Isa::either(nan, Isa::is_nan(value));
  };
  for (; d + Isa::kLanes <= dim; d += Isa::kLanes) take(Isa::load(x + d));
  for (; d < dim; ++d) take(Isa::set(widen(x[d])));
  // Which zero is the least depends on the order; adding 0 makes both the same.
  *lo = Isa::reduce_min(least) + 0.0f;
  *hi = Isa::reduce_max(greatest) + 0.0f;
  const float span = *hi - *lo;
  return !Isa::any(nan) && span - span == 0.0f;
}

// q = rint((x - lo) / scale), between 0 and `levels`, for at most kChunk values.
template <class Isa, class T>
inline void quantize_above(const T* x, int64_t count, float lo, float scale, int levels,
                           uint8_t* q) {
  const typename Isa::Float minus_lo = Isa::set(-lo), divisor = Isa::set(scale);
  const typename Isa::Int zero = Isa::set_int(0), most = Isa::set_int(levels);
  const auto bytes = [&](typename Isa::Float value) {
    value = Isa::div(Isa::add_float(value, minus_lo), divisor);
    return Isa::min_int(Isa::max_int(Isa::round_to_int(value), zero), most);
  };
  quantize_run<Isa>(bytes, x, count, ByteRows<1>{{q}});
}

template <class Isa, class T>
inline bool quantize_row_of(const T* x, int64_t dim, int bits, uint8_t* q, float* qparams) {
  const int levels = (1 << bits) - 1;
  float lo = 0.0f, hi = 0.0f;
  if (dim > 0 && !extremes<Isa>(x, dim, &lo, &hi)) return false;
  qparams[0] = (hi - lo) / static_cast<float>(levels);
  qparams[1] = lo;
  const bool flat = qparams[0] < kLeastScale;
  if (flat) qparams[0] = 1.0f;
  uint8_t chunk[kChunk];
  for (int64_t d = 0; d < dim; d += kChunk) {
    const int64_t count = dim - d < kChunk ? dim - d : kChunk;
    quantize_above<Isa>(x + d, count, lo, qparams[0], flat ? 0 : levels, chunk);
    if (bits == 8) {
      memcpy(q + d, chunk, static_cast<size_t>(count));
      continue;
    }
    for (int64_t i = 0; i < count; i += 2) {
      const int high = i + 1 < count ? chunk[i + 1] : 0;
      q[(d + i) / 2] = static_cast<uint8_t>(chunk[i] | (high << 4));
    }
  }
  return true;
}

template <class Isa>
bool quantize_row(const void* x, Dtype dtype, int64_t dim, int bits, uint8_t* q, float* qparams) {
  return with_type(x, dtype, [&](const auto* typed) {
    return quantize_row_of<Isa>(typed, dim, bits, q, qparams);
  });
}

template <class Isa, int Bits>
inline typename Isa::Float load_q(const uint8_t* row, int64_t d) {
  if constexpr (Bits == 8) return Isa::to_float(Isa::load_bytes(row + d));
  return Isa::to_float(Isa::load_nibbles(row, d));
}

inline int64_t index_at(const BagArgs& a, int64_t i) {
  return a.wide_indices ? static_cast<const int64_t*>(a.indices)[i]
                        : static_cast<const int32_t*>(a.indices)[i];
}

constexpr int64_t kAhead = 16;  // rows that are fetched from memory at the same time

// Asks for bytes [begin, end) of a row that comes later, and for its parameters. GCC drops
// the call of a function that does nothing else, as if it had no effect.
__attribute__((always_inline)) inline void prefetch_row(const BagArgs& a, int64_t i, int64_t begin,
                                                        int64_t end) {
  const int64_t index = index_at(a, i);
  const uint8_t* row = a.rows + index * a.row_bytes;
  for (int64_t byte = begin; byte < end; byte += kLine) __builtin_prefetch(row + byte);
  __builtin_prefetch(a.qparams + 2 * index);
}

// Values [d, d + V * kLanes) of one bag in fp32, in V registers. A table narrower than a register
// is read through a copy that fills it up.
template <class Isa, int Bits, int V>
inline void bag_values(const BagArgs& a, int64_t first, int64_t last, int64_t d,
                       typename Isa::Float* sum) {
  const bool narrow_row = a.row_bytes * 8 / Bits < Isa::kLanes;
  const bool largest = a.mode == BagMode::max;
  uint8_t copy[Isa::kLanes] = {};
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) sum[v] = Isa::set(largest ? -__builtin_inff() : 0.0f);
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < a.count) {
      prefetch_row(a, i + kAhead, d * Bits / 8, (d + V * Isa::kLanes) * Bits / 8);
    }
    const int64_t index = index_at(a, i);
    if (index == a.padding_idx) continue;
    ++count;
    const uint8_t* row = a.rows + index * a.row_bytes;
    if (narrow_row) {
      memcpy(copy, row, static_cast<size_t>(a.row_bytes));
      row = copy;
    }
    const typename Isa::Float scale = Isa::set(a.qparams[2 * index]);
    const typename Isa::Float offset = Isa::set(a.qparams[2 * index + 1]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      typename Isa::Float value = Isa::mul(load_q<Isa, Bits>(row, d + v * Isa::kLanes), scale);
      value = Isa::add_float(value, offset);
      if (largest) {
        sum[v] = Isa::max(value, sum[v]);
        continue;
      }
      if (a.per_sample_weights != nullptr) {
        value = Isa::mul(value, Isa::set(a.per_sample_weights[i]));
      }
      sum[v] = Isa::add_float(sum[v], value);
    }
  }
  const typename Isa::Float divisor = Isa::set(static_cast<float>(count));
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    if (count == 0) sum[v] = Isa::set(0.0f);
    if (count > 0 && a.mode == BagMode::mean) sum[v] = Isa::div(sum[v], divisor);
  }
}

// As many steps of V registers as fit before `end`, beginning at d; then of fewer.
template <class Isa, int Bits, int V>
inline int64_t bag_steps(const BagArgs& a, int64_t bag, int64_t first, int64_t last, int64_t d) {
  constexpr int64_t kStep = V * Isa::kLanes;
  for (; d + kStep <= a.dim; d += kStep) {
    typename Isa::Float sum[V];
    bag_values<Isa, Bits, V>(a, first, last, d, sum);
    with_output(a.out, a.out_dtype, bag * a.dim + d, [&](auto* out) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) Isa::store(out + v * Isa::kLanes, sum[v]);
    });
  }
  if constexpr (V > 1) return bag_steps<Isa, Bits, V / 2>(a, bag, first, last, d);
  return d;
}

// The last values of a row, fewer than a register: that register ends with the row, and what it
// computes a second time is not stored.
template <class Isa, int Bits>
inline void bag_tail(const BagArgs& a, int64_t bag, int64_t first, int64_t last, int64_t d) {
  const int64_t held = a.row_bytes * 8 / Bits;
  const int64_t begin = held < Isa::kLanes ? 0 : held - Isa::kLanes;
  typename Isa::Float sum;
  bag_values<Isa, Bits, 1>(a, first, last, begin, &sum);
  float values[Isa::kLanes];
  Isa::store(values, sum);
  with_output(a.out, a.out_dtype, bag * a.dim, [&](auto* out) {
    for (int64_t i = d; i < a.dim; ++i) narrow(values[i - begin], out + i);
  });
}

template <class Isa, int Bits>
inline void bags_of(const BagArgs& a) {
  constexpr int V = Isa::kRegisters >= 16 ? 8 : 1;
  for (int64_t bag = a.begin; bag < a.end; ++bag) {
    const int64_t first = a.offsets == nullptr ? bag * a.bag_size : a.offsets[bag];
    const int64_t last = a.offsets == nullptr ? first + a.bag_size : a.offsets[bag + 1];
    const int64_t d = bag_steps<Isa, Bits, V>(a, bag, first, last, 0);
    if (d < a.dim) bag_tail<Isa, Bits>(a, bag, first, last, d);
  }
}

template <class Isa>
void bags(const BagArgs& a) {
  return a.bits == 8 ? bags_of<Isa, 8>(a) : bags_of<Isa, 4>(a);
}

}  // namespace
}  // namespace dynquant
