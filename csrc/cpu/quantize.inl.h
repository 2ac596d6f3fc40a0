// Activation quantization, written once over an `Isa` type (scalar.cpp lists what such a type has).
#pragma once

#include "convert.h"
#include "excess.inl.h"
#include "kernels.h"
#include "layout.h"
#include "qparams.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

// Calls f with a typed pointer to x.
template <class F>
inline auto with_type(const void* x, Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(static_cast<const Bfloat16*>(x));
    case Dtype::f16:
      return f(static_cast<const Half*>(x));
    default:
      return f(static_cast<const float*>(x));
  }
}

// The same where there may be int8 as well.
template <class F>
inline auto with_type_or_int8(const void* x, Dtype dtype, F f) {
  return dtype == Dtype::i8 ? f(static_cast<const int8_t*>(x)) : with_type(x, dtype, f);
}

// Calls f with a typed pointer to element `i` of a float output.
template <class F>
inline void with_output(void* out, Dtype dtype, int64_t i, F f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(static_cast<Bfloat16*>(out) + i);
    case Dtype::f16:
      return f(static_cast<Half*>(out) + i);
    default:
      return f(static_cast<float*>(out) + i);
  }
}

// The last register of a row of k values. It takes values again that are done already where the row
// has enough: that changes nothing and needs no copy.
template <class Isa, class T>
inline typename Isa::Float load_last(const T* x, int64_t k) {
  if (k >= Isa::kLanes) return Isa::load(x + k - Isa::kLanes);
  return load_part<Isa>(x, k);  // zero lies in every range
}

template <class Isa>
struct Extremes {
  typename Isa::Float lo = Isa::set(0.0f);
  typename Isa::Float hi = Isa::set(0.0f);

  // The accumulator stands second: min and max give their second operand where either is NaN, so a
  // NaN leaves no trace.
  inline void add(typename Isa::Float x) { add(x, x); }
  inline void add(typename Isa::Float low, typename Isa::Float high) {
    lo = Isa::min(low, lo);
    hi = Isa::max(high, hi);
  }
};

template <class Isa, class T>
inline Range range_of(const T* x, int64_t k) {
  constexpr int64_t kStep = Isa::kLanes;
  // Two chains hide the latency of min and max; one comparison finds the NaN of both.
  Extremes<Isa> even, odd;
  typename Isa::Mask nan = Isa::no_mask();
  int64_t i = 0;
  for (; i + 2 * kStep <= k; i += 2 * kStep) {
    const typename Isa::Float a = Isa::load(x + i), b = Isa::load(x + i + kStep);
    even.add(a);
    odd.add(b);
    nan = Isa::either(nan, Isa::unordered(a, b));
  }
  for (; i < k; i += kStep) {
    const typename Isa::Float a = i + kStep <= k ? Isa::load(x + i) : load_last<Isa>(x, k);
    even.add(a);
    nan = Isa::either(nan, Isa::is_nan(a));
  }
  even.add(odd.lo, odd.hi);
  return {Isa::reduce_min(even.lo), Isa::reduce_max(even.hi), Isa::any(nan)};
}

template <class Isa>
Range range(const void* x, Dtype dtype, int64_t k) {
  return with_type(x, dtype, [k](const auto* typed) { return range_of<Isa>(typed, k); });
}

struct Multiply {
  template <class Isa>
  static inline typename Isa::Int round(typename Isa::Float x, typename Isa::Float factor,
                                        typename Isa::Float) {
    return Isa::round_to_int(Isa::mul(x, factor));
  }
};

// A quotient by a foreign scale may be of any size, which is brought into the range that int32 and
// the zero point leave room for, or NaN, which becomes `nan`.
struct Divide {
  template <class Isa>
  static inline typename Isa::Int round(typename Isa::Float x, typename Isa::Float factor,
                                        typename Isa::Float nan) {
    typename Isa::Float quotient = Isa::div(x, factor);
    quotient = Isa::select(Isa::is_nan(quotient), nan, quotient);
    quotient = Isa::min(Isa::max(quotient, Isa::set(-131072.0f)), Isa::set(131072.0f));
    return Isa::round_to_int(quotient);
  }
};

template <class Isa, class Scaling>
struct ToIntegers {
  typename Isa::Float factor, nan;
  typename Isa::Int zero_point, q_min, q_max;  // of the shifted q
  bool every_byte;

  explicit inline ToIntegers(const QuantizeArgs& a)
      : factor(Isa::set(a.factor)),
        nan(Isa::set(static_cast<float>(-a.zero_point))),
        zero_point(Isa::set_int(a.zero_point + a.shift)),
        q_min(Isa::set_int(a.q_min + a.shift)),
        q_max(Isa::set_int(a.q_max + a.shift)),
        every_byte(a.q_min + a.shift == 0 && a.q_max + a.shift == 255) {}

  inline typename Isa::Int unlimited(typename Isa::Float x) const {
    return Isa::add(Scaling::template round<Isa>(x, factor, nan), zero_point);
  }
  inline typename Isa::Int operator()(typename Isa::Float x) const {
    return Isa::min_int(Isa::max_int(unlimited(x), q_min), q_max);
  }
};

// Where the bytes of integers go: those of 8 bits, or the high and the low ones of 16.
template <int Bytes>
struct ByteRows {
  uint8_t* row[Bytes];

  inline ByteRows from(int64_t i) const {
    ByteRows moved = *this;
    for (int b = 0; b < Bytes; ++b) moved.row[b] += i;
    return moved;
  }
  template <class Isa>
  inline void store(int64_t i, typename Isa::Int x) const {
    if constexpr (Bytes == 2) Isa::store_bytes(row[0] + i, Isa::high_byte(x));
    Isa::store_bytes(row[Bytes - 1] + i, x);
  }
};

// Calls f with the ByteRows of the arguments.
template <class F>
inline void with_byte_rows(const QuantizeArgs& a, F f) {
  if (a.low == nullptr) return f(ByteRows<1>{{a.q}});
  return f(ByteRows<2>{{a.q, a.low}});
}

// k integers as bytes, four or two registers at a time, which takes half the instructions: packing
// saturates, as a clamp to all bytes does. `integers(i)` is the register of those from number i on.
// Gives how many there were registers enough for.
template <class Isa, bool Signed, class F>
inline int64_t pack_registers(const F& integers, int64_t k, uint8_t* q) {
  constexpr int64_t kLanes = Isa::kLanes;
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    Isa::template store_saturated<Signed>(q + i, integers(i), integers(i + kLanes),
                                          integers(i + 2 * kLanes), integers(i + 3 * kLanes));
  }
  if (i + 2 * kLanes <= k) {
    Isa::template store_saturated<Signed>(q + i, integers(i), integers(i + kLanes));
    i += 2 * kLanes;
  }
  return i;
}

// How many of k values became bytes without a clamp.
template <class Isa, class F, class T>
inline int64_t quantize_packed(const F&, const T*, int64_t, uint8_t*) {
  return 0;
}
template <class Isa, class T>
inline int64_t quantize_packed(const ToIntegers<Isa, Multiply>& to_integers, const T* x, int64_t k,
                               uint8_t* q) {
  if (!to_integers.every_byte) return 0;
  const auto integers = [&](int64_t i) { return to_integers.unlimited(Isa::load(x + i)); };
  return pack_registers<Isa, false>(integers, k, q);
}

// k values as bytes, where `to_integers` makes a register of them integers that fit.
template <class Isa, int Bytes, class F, class T>
inline void quantize_run(const F& to_integers, const T* x, int64_t k, const ByteRows<Bytes>& q) {
  int64_t i = 0;
  if constexpr (Bytes == 1) i = quantize_packed<Isa>(to_integers, x, k, q.row[0]);
  for (; i + Isa::kLanes <= k; i += Isa::kLanes) {
    q.template store<Isa>(i, to_integers(Isa::load(x + i)));
  }
  if (i >= k) return;
  const typename Isa::Int last = to_integers(load_last<Isa>(x, k));
  if (k >= Isa::kLanes) return q.template store<Isa>(k - Isa::kLanes, last);
  uint8_t bytes[Bytes * Isa::kLanes];
  ByteRows<Bytes> beside;
  for (int b = 0; b < Bytes; ++b) beside.row[b] = bytes + b * Isa::kLanes;
  beside.template store<Isa>(0, last);
  for (int b = 0; b < Bytes; ++b) memcpy(q.row[b], beside.row[b], static_cast<size_t>(k));
}

template <class Isa, class Scaling>
void quantize(const QuantizeArgs& a) {
  const ToIntegers<Isa, Scaling> to_integers(a);
  with_type(a.x, a.dtype, [&](const auto* x) {
    with_byte_rows(a, [&](const auto& q) { quantize_run<Isa>(to_integers, x, a.k, q); });
  });
}

constexpr int64_t kTogether = 16;  // vectors that go through each step one after the other

// The ranges of some vectors, and what follows from them. Where nothing is quantized, inv is 0.
struct Together {
  float lo[kTogether] = {}, hi[kTogether] = {};  // lo is NaN where a vector holds one
  float scale[kTogether], inv[kTogether];
  int32_t zero_point[kTogether];

  inline void set(int64_t i, const Range& range) {
    lo[i] = range.has_nan ? NAN : range.lo;
    hi[i] = range.hi;
  }
  inline QParams at(int64_t i) const { return {scale[i], inv[i], zero_point[i], inv[i] == 0.0f}; }
};

// choose_qparams, a register of vectors at a time: one by one, it takes longer than the rest.
template <class Isa>
inline void choose_together(bool symmetric, Together& v) {
  using Float = typename Isa::Float;
  const auto is_infinite = [](Float x) { return Isa::is_nan(Isa::sub_float(x, x)); };  // or NaN
  const Float zero = Isa::set(0.0f), levels = Isa::set(symmetric ? 127.0f : 255.0f);
  for (int64_t i = 0; i < kTogether; i += Isa::kLanes) {
    const Float lo = Isa::load(v.lo + i), hi = Isa::load(v.hi + i);
    const Float below = Isa::sub_float(zero, lo);
    // Where lo is NaN, max would hide it.
    const Float amax = Isa::add_float(Isa::max(below, hi), Isa::sub_float(lo, lo));
    const Float span = symmetric ? amax : Isa::sub_float(hi, lo);
    const auto has_no_span = is_infinite(span);
    const Float inv = Isa::div(levels, span);
    const auto has_no_inv = is_infinite(inv);
    Isa::store(v.inv + i, Isa::select(Isa::either(has_no_span, has_no_inv), zero, inv));
    const Float scale = Isa::select(has_no_inv, Isa::set(1.0f), Isa::div(span, levels));
    Isa::store(v.scale + i, Isa::select(has_no_span, Isa::set(NAN), scale));
    typename Isa::Int zero_point = Isa::set_int(0);
    if (!symmetric) {
      zero_point = Isa::round_to_int(Isa::mul(below, Isa::load(v.inv + i)));
      zero_point = Isa::min_int(Isa::max_int(zero_point, Isa::set_int(0)), Isa::set_int(255));
    }
    Isa::store_int(v.zero_point + i, zero_point);
  }
}

// How many of a vector's values became bytes without a clamp: by its own range, none is beyond its
// bytes by more than one, and no symmetric one is.
template <class Isa, bool Symmetric, class T>
inline int64_t quantize_own(const T* x, int64_t k, float inv, int32_t zero_point, uint8_t* q) {
  const typename Isa::Float factor = Isa::set(inv);
  const typename Isa::Int zero = Isa::set_int(zero_point);
  const auto integers = [&](int64_t i) {
    const typename Isa::Int rounded = Isa::round_to_int(Isa::mul(Isa::load(x + i), factor));
    return Symmetric ? rounded : Isa::add(rounded, zero);
  };
  return pack_registers<Isa, Symmetric>(integers, k, q);
}

template <class Isa>
void quantize_vectors(const QuantizeVectorsArgs& a) {
  with_type(a.x, a.dtype, [&](const auto* x) {
    const int64_t ahead_bytes = a.ahead == 0 ? 0 : a.k * static_cast<int64_t>(sizeof *x);
    Together v;
    // Step by step for several vectors: for one alone, each step would wait for the one before it.
    for (int64_t first = 0; first < a.count; first += kTogether) {
      const int64_t count = a.count - first < kTogether ? a.count - first : kTogether;
      const auto* vectors = x + first * a.x_stride;
      for (int64_t i = 0; i < count; ++i) {
        const char* later = reinterpret_cast<const char*>(vectors + i * a.x_stride) + a.ahead;
        for (int64_t b = 0; b < ahead_bytes; b += kLine) __builtin_prefetch(later + b);
        v.set(i, a.range == nullptr ? range_of<Isa>(vectors + i * a.x_stride, a.k)
                                    : a.range[first + i]);
      }
      choose_together<Isa>(a.symmetric, v);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = first + i;
        const auto* vector = vectors + i * a.x_stride;
        uint8_t* q = a.q + at * a.q_stride;
        int64_t done = 0;
        if (v.inv[i] != 0.0f) {
          done = a.symmetric ? quantize_own<Isa, true>(vector, a.k, v.inv[i], 0, q)
                             : quantize_own<Isa, false>(vector, a.k, v.inv[i], v.zero_point[i], q);
        }
        if (done < a.k) {
          const ToIntegers<Isa, Multiply> to_integers(quantize_args(v.at(i), a.symmetric, false));
          quantize_run<Isa>(to_integers, vector + done, a.k - done, ByteRows<1>{{q + done}});
        }
        a.scale[at * a.value_stride] = v.scale[i];
        if (a.zero_point != nullptr) a.zero_point[at * a.value_stride] = v.zero_point[i];
      }
    }
  });
}

// Plain bytes, filled up with zeros to a whole group, in the order that Isa reads. Gives what their
// products have too much.
template <class Isa>
inline int32_t stage_padded(const uint8_t* q, int64_t k, uint8_t* staged) {
  const int64_t whole = k / kGroup;
  int32_t excess = Isa::stage(q, whole, staged);
  if (k % kGroup != 0) {
    uint8_t last[kGroup] = {};
    memcpy(last, q + whole * kGroup, static_cast<size_t>(k % kGroup));
    excess += Isa::stage(last, 1, staged + whole * Isa::kGroupBytes);
  }
  return excess;
}

template <class Isa, int Bytes>
inline void end_rows(const ByteRows<Bytes>& staged, int64_t k, const int32_t (&excess)[Bytes]) {
  if constexpr (Isa::kOffset != 0) {
    const ByteRows<Bytes> behind = staged.from(groups_of(k) * Isa::kGroupBytes);
    for (int b = 0; b < Bytes; ++b) set_excess(behind.row[b], excess[b]);
  }
}

constexpr int64_t kChunk = 512;  // values that wait on the stack for being brought in order

template <class Isa, int Bytes, class F, class T>
inline void quantize_run_staged(const F& to_integers, const T* x, int64_t k,
                                const ByteRows<Bytes>& staged) {
  if constexpr (Isa::kGroupBytes == kGroup) {
    quantize_run<Isa>(to_integers, x, k, staged);
    for (int b = 0; b < Bytes; ++b) {
      for (int64_t i = k; i < groups_of(k) * kGroup; ++i) staged.row[b][i] = 0;
    }
  } else {
    uint8_t bytes[Bytes * kChunk];
    ByteRows<Bytes> chunk;
    for (int b = 0; b < Bytes; ++b) chunk.row[b] = bytes + b * kChunk;
    int32_t excess[Bytes] = {};
    for (int64_t i = 0; i < k; i += kChunk) {
      const int64_t count = k - i < kChunk ? k - i : kChunk;
      quantize_run<Isa>(to_integers, x + i, count, chunk);
      const ByteRows<Bytes> to = staged.from(i / kGroup * Isa::kGroupBytes);
      for (int b = 0; b < Bytes; ++b) {
        excess[b] += stage_padded<Isa>(chunk.row[b], count, to.row[b]);
      }
    }
    end_rows<Isa>(staged, k, excess);
  }
}

template <class Isa>
void quantize_staged(const QuantizeArgs& a) {
  const ToIntegers<Isa, Multiply> to_integers(a);
  with_type(a.x, a.dtype, [&](const auto* x) {
    with_byte_rows(a, [&](const auto& q) { quantize_run_staged<Isa>(to_integers, x, a.k, q); });
  });
}

template <class Isa>
void stage(const uint8_t* q, int64_t k, uint8_t flip, uint8_t* staged) {
  uint8_t chunk[kChunk];
  int32_t excess[1] = {};
  for (int64_t i = 0; i < k; i += kChunk) {
    const int64_t count = k - i < kChunk ? k - i : kChunk;
    for (int64_t j = 0; j < count; ++j) chunk[j] = static_cast<uint8_t>(q[i + j] ^ flip);
    excess[0] += stage_padded<Isa>(chunk, count, staged + i / kGroup * Isa::kGroupBytes);
  }
  end_rows<Isa>(ByteRows<1>{{staged}}, k, excess);
}

}  // namespace
}  // namespace dynquant
