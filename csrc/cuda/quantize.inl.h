// Activation and weight quantization: ranges, parameters, bytes.
//
// A row whose parameters are its own is read from memory once: its threads keep up to four times 16
// bytes each in registers between finding the range and making bytes, for which the number of
// threads is chosen. Only what a row has beyond that (64 KiB) is read again.
#pragma once

#include "../cpu/convert.h"
#include "../cpu/qparams.h"
#include "args.h"
#include "gpu.h"

namespace dynquant {

// The type of values by its name: kernels are named by it, since Half and Bfloat16 are each file's
// own.
template <Dtype D>
struct ValueOf;
template <>
struct ValueOf<Dtype::f32> {
  using Type = float;
};
template <>
struct ValueOf<Dtype::bf16> {
  using Type = Bfloat16;
};
template <>
struct ValueOf<Dtype::f16> {
  using Type = Half;
};
template <Dtype D>
constexpr int kValueBytes = D == Dtype::f32 ? 4 : 2;

template <class T>
constexpr int kValuesOf16Bytes = 16 / static_cast<int>(sizeof(T));

// Values [16-byte vector `vector` of a row], zeros beyond its end: zero lies in every range.
template <class Gpu, class T>
DYNQUANT_DEVICE Bytes16 load_values(const T* row, int64_t vector, int64_t k, bool aligned) {
  constexpr int kValues = kValuesOf16Bytes<T>;
  const int64_t first = vector * kValues;
  Bytes16 bytes = {};
  if (aligned && first + kValues <= k) return Gpu::load16(row + first);
  T values[kValues] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (first + i < k) values[i] = row[first + i];
  }
  memcpy(&bytes, values, sizeof bytes);
  return bytes;
}

template <class Gpu, class T>
DYNQUANT_DEVICE void widen_all(const Bytes16& bytes, float (&x)[kValuesOf16Bytes<T>]) {
  T values[kValuesOf16Bytes<T>];
  memcpy(values, &bytes, sizeof values);
#pragma unroll
  for (int i = 0; i < kValuesOf16Bytes<T>; ++i) x[i] = Gpu::widen(values[i]);
}

// A comparison with NaN is false, so NaN leaves no trace in lo and hi.
DYNQUANT_DEVICE void add_to(Range& range, float x) {
  range.lo = x < range.lo ? x : range.lo;
  range.hi = x > range.hi ? x : range.hi;
  range.has_nan = range.has_nan || x != x;
}
DYNQUANT_DEVICE void add_to(Range& range, const Range& other) {
  add_to(range, other.lo);
  add_to(range, other.hi);
  range.has_nan = range.has_nan || other.has_nan;
}
template <class Gpu, class T>
DYNQUANT_DEVICE void add_to(Range& range, const Bytes16& bytes) {
  float x[kValuesOf16Bytes<T>];
  widen_all<Gpu, T>(bytes, x);
#pragma unroll
  for (int i = 0; i < kValuesOf16Bytes<T>; ++i) add_to(range, x[i]);
}

// The range of all that a warp's threads saw; each of them gets it.
template <class Gpu>
DYNQUANT_DEVICE Range range_over_warp(Range range) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    add_to(range, Range{Gpu::shuffle_xor(range.lo, mask), Gpu::shuffle_xor(range.hi, mask),
                        Gpu::shuffle_xor(range.has_nan ? 1 : 0, mask) != 0});
  }
  return range;
}

// The same over `threads` threads: a warp, or the whole block of up to 32 warps. `shared` has room
// for one Range of each warp.
template <class Gpu>
DYNQUANT_DEVICE Range range_over(Range range, int threads, Range* shared) {
  range = range_over_warp<Gpu>(range);
  if (threads == 32) return range;
  const int lane = Gpu::thread() % 32;
  if (lane == 0) shared[Gpu::thread() / 32] = range;
  Gpu::sync();
  return range_over_warp<Gpu>(lane < threads / 32 ? shared[lane] : Range{0.0f, 0.0f, false});
}

// How a row becomes bytes, and the scale to be stored.
struct RowParameters {
  QuantizeArgs to_bytes;
  float scale;
  bool refused;
};

DYNQUANT_DEVICE RowParameters parameters_of(const Range& range, Rule rule, int32_t shift) {
  if (rule != Rule::weight) {
    const bool symmetric = rule == Rule::symmetric;
    const QParams p = choose_qparams(range, symmetric);
    RowParameters result = {quantize_args(p, symmetric, shift != 0), p.scale, false};
    return result;
  }
  constexpr float kSmallestScale = 0x1p-126f;
  RowParameters result = {};
  result.scale = (-range.lo > range.hi ? -range.lo : range.hi) / 127.0f;
  result.refused = range.has_nan || !isfinite(result.scale);
  const bool tiny = result.scale < kSmallestScale;
  if (tiny) result.scale = 1.0f;
  result.to_bytes.factor = result.scale;
  result.to_bytes.q_min = tiny ? 0 : -127;
  result.to_bytes.q_max = tiny ? 0 : 127;
  return result;
}

DYNQUANT_DEVICE RowParameters given_parameters(const QuantizeRowsArgs& a, int64_t row) {
  const bool symmetric = a.rule == Rule::symmetric;
  RowParameters result = {};
  result.scale = a.given_scale.data[row * a.given_scale.step];
  result.to_bytes.factor = result.scale;
  result.to_bytes.zero_point = a.given_zero_point.data[row * a.given_zero_point.step];
  result.to_bytes.q_min = symmetric ? -127 : 0;
  result.to_bytes.q_max = symmetric ? 127 : 255;
  return result;
}

// A quotient by a given scale may be of any size, which is brought into the range that int32 and
// the zero point leave room for, or NaN, which the zero point then turns to 0.
template <class Gpu>
DYNQUANT_DEVICE float bounded_quotient(float x, const QuantizeArgs& a) {
  const float quotient = Gpu::div(x, a.factor);
  if (quotient != quotient) return Gpu::to_float(-a.zero_point);
  return quotient < -1024.0f ? -1024.0f : quotient > 1024.0f ? 1024.0f : quotient;
}

template <class Gpu, bool Divide>
DYNQUANT_DEVICE uint8_t byte_of(float x, const QuantizeArgs& a) {
  const float scaled = Divide ? bounded_quotient<Gpu>(x, a) : Gpu::mul(x, a.factor);
  int32_t q = Gpu::round_to_int(scaled);
  // An all-zero row may hold anything, whose integer could not take the sum.
  if (a.q_min == a.q_max) q = 0;
  q += a.zero_point;
  q = q < a.q_min ? a.q_min : q > a.q_max ? a.q_max : q;
  return static_cast<uint8_t>(q + a.shift);
}

// Bytes of one vector, zeros beyond K, to their place in a row of q.
template <class Gpu, class T, bool Divide>
DYNQUANT_DEVICE void store_bytes(const Bytes16& bytes, int64_t vector, const QuantizeArgs& to_bytes,
                                 const QuantizeRowsArgs& a, uint8_t* q) {
  constexpr int kValues = kValuesOf16Bytes<T>;
  float x[kValues];
  widen_all<Gpu, T>(bytes, x);
  const int64_t first = vector * kValues;
  uint8_t out[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    out[i] = first + i < a.rows.k ? byte_of<Gpu, Divide>(x[i], to_bytes) : uint8_t{0};
  }
  q += first;
  if (first + kValues <= a.q_bytes && reinterpret_cast<uintptr_t>(q) % kValues == 0) {
    uint32_t words[kValues / 4];
    memcpy(words, out, sizeof words);
#pragma unroll
    for (int i = 0; i < kValues / 4; ++i) reinterpret_cast<uint32_t*>(q)[i] = words[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (first + i < a.q_bytes) q[i] = out[i];
  }
}

// Rows whose parameters are their own.
template <Dtype D, int RowThreads, bool Divide>
struct QuantizeRowsKernel {
  using Args = QuantizeRowsArgs;
  static constexpr int kThreads = RowThreads < 128 ? 128 : RowThreads;
  static constexpr int kBlocks = 1;
  static constexpr int kRows = kThreads / RowThreads;  // of a block
  static constexpr int kHeld = 4;                      // vectors of a thread
  static_assert(kRows == 1 || RowThreads == 32, "rows that share a block have a warp each");

  static constexpr int shared_bytes() { return kThreads / 32 * static_cast<int>(sizeof(Range)); }
  static Grid grid(int64_t m) { return {ceil_div(m, kRows), 1}; }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    using T = typename ValueOf<D>::Type;
    const int thread = Gpu::thread() % RowThreads;
    const int64_t row = Gpu::block_x() * kRows + Gpu::thread() / RowThreads;
    if (row >= a.rows.m) return;
    const T* x =
        reinterpret_cast<const T*>(static_cast<const uint8_t*>(a.rows.x) + row * a.rows.stride);
    const int64_t vectors = ceil_div(a.rows.k, kValuesOf16Bytes<T>);
    Bytes16 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = load_values<Gpu>(x, thread + int64_t{i} * RowThreads, a.rows.k, a.rows.aligned);
    }
    Range range = {0.0f, 0.0f, false};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) add_to<Gpu, T>(range, held[i]);
    for (int64_t v = thread + int64_t{kHeld} * RowThreads; v < vectors; v += RowThreads) {
      add_to<Gpu, T>(range, load_values<Gpu>(x, v, a.rows.k, a.rows.aligned));
    }
    range = range_over<Gpu>(range, RowThreads, reinterpret_cast<Range*>(Gpu::shared()));

    const RowParameters p = parameters_of(range, a.rule, a.shift);
    if (thread == 0) {
      if (a.scale != nullptr) a.scale[row] = p.scale;
      if (a.zero_point != nullptr) a.zero_point[row] = p.to_bytes.zero_point + a.shift;
      if (a.refused != nullptr && p.refused) *a.refused = 1;
    }
    if (a.q == nullptr) return;
    uint8_t* q = a.q + row * a.q_stride;
    const int64_t out_vectors = ceil_div(a.q_bytes, kValuesOf16Bytes<T>);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t v = thread + int64_t{i} * RowThreads;
      if (v < out_vectors) store_bytes<Gpu, T, Divide>(held[i], v, p.to_bytes, a, q);
    }
    for (int64_t v = thread + int64_t{kHeld} * RowThreads; v < out_vectors; v += RowThreads) {
      const Bytes16 values = load_values<Gpu>(x, v, a.rows.k, a.rows.aligned);
      store_bytes<Gpu, T, Divide>(values, v, p.to_bytes, a, q);
    }
  }
};

// Rows whose parameters are known: given ones, or those of a tensor whose ranges were found.
template <Dtype D, bool Divide>
struct QuantizeKnownKernel {
  using Args = QuantizeRowsArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;

  static constexpr int shared_bytes() { return kThreads / 32 * static_cast<int>(sizeof(Range)); }
  static Grid grid(int64_t m, int64_t k) {
    constexpr int64_t kMostParts = 256;
    const int64_t parts = ceil_div(k * kValueBytes<D>, 16 * kThreads);
    return {m > 0 ? m : 1, static_cast<int>(parts < 1            ? 1
                                            : parts < kMostParts ? parts
                                                                 : kMostParts)};
  }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    using T = typename ValueOf<D>::Type;
    const int64_t row = Gpu::block_x();
    RowParameters p;
    if (a.given_scale.data != nullptr) {
      if (row >= a.rows.m) return;
      p = given_parameters(a, row);
    } else {
      Range range = {0.0f, 0.0f, false};
      for (int i = Gpu::thread(); i < a.range_count; i += kThreads) add_to(range, a.ranges[i]);
      range = range_over<Gpu>(range, kThreads, reinterpret_cast<Range*>(Gpu::shared()));
      p = parameters_of(range, a.rule, a.shift);
    }
    if (row == 0 && Gpu::block_y() == 0 && Gpu::thread() == 0) {
      if (a.scale != nullptr) *a.scale = p.scale;
      if (a.zero_point != nullptr) *a.zero_point = p.to_bytes.zero_point + a.shift;
      if (a.refused != nullptr && p.refused) *a.refused = 1;
    }
    if (a.q == nullptr || row >= a.rows.m) return;
    const T* x =
        reinterpret_cast<const T*>(static_cast<const uint8_t*>(a.rows.x) + row * a.rows.stride);
    uint8_t* q = a.q + row * a.q_stride;
    const int64_t vectors = ceil_div(a.q_bytes, kValuesOf16Bytes<T>);
    const int64_t step = int64_t{kThreads} * Gpu::grid_y();
    for (int64_t v = int64_t{kThreads} * Gpu::block_y() + Gpu::thread(); v < vectors; v += step) {
      const Bytes16 values = load_values<Gpu>(x, v, a.rows.k, a.rows.aligned);
      store_bytes<Gpu, T, Divide>(values, v, p.to_bytes, a, q);
    }
  }
};

// The range of all rows together, in as many parts as there are blocks.
template <Dtype D>
struct RangeKernel {
  using Args = RangeArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  static constexpr int kChunk = 4 * kThreads;  // vectors that a block takes at once
  static constexpr int kMostRanges = 512;

  static constexpr int shared_bytes() { return kThreads / 32 * static_cast<int>(sizeof(Range)); }
  static Grid grid(int64_t m, int64_t k) {
    const int64_t chunks = m * chunks_of(k);
    return {chunks < kMostRanges ? chunks : kMostRanges, 1};
  }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    using T = typename ValueOf<D>::Type;
    const int64_t row_chunks = chunks_of(a.rows.k);
    Range range = {0.0f, 0.0f, false};
    for (int64_t i = Gpu::block_x(); i < a.rows.m * row_chunks; i += Gpu::grid_x()) {
      const int64_t row = i / row_chunks, first = i % row_chunks * kChunk + Gpu::thread();
      const T* x =
          reinterpret_cast<const T*>(static_cast<const uint8_t*>(a.rows.x) + row * a.rows.stride);
#pragma unroll
      for (int j = 0; j < kChunk / kThreads; ++j) {
        const int64_t vector = first + j * kThreads;
        add_to<Gpu, T>(range, load_values<Gpu>(x, vector, a.rows.k, a.rows.aligned));
      }
    }
    range = range_over<Gpu>(range, kThreads, reinterpret_cast<Range*>(Gpu::shared()));
    if (Gpu::thread() == 0) a.ranges[Gpu::block_x()] = range;
  }

 private:
  static DYNQUANT_BOTH int64_t chunks_of(int64_t k) {
    return ceil_div(k * kValueBytes<D>, 16 * kChunk);
  }
};

}  // namespace dynquant
