// Loops over arrays of floats by whole registers, with a last one that is filled up.
#pragma once

#include <stdint.h>
#include <string.h>

#include "pair.inl.h"

namespace dynquant {
namespace {

// A number as a type.
template <int N>
struct Count {
  static constexpr int kCount = N;
  constexpr operator int64_t() const { return N; }
};

// f(a value of the type Count<count>), where count is 1 to N.
template <int N, class F>
inline void with_count(int64_t count, const F& f) {
  if (count == N) return f(Count<N>());
  if constexpr (N > 1) return with_count<N - 1>(count, f);
}

// The sum of N registers, a power of two: the upper half is added to the lower until one is left.
template <class Isa, int N>
inline typename Isa::Float sum_by_halves(typename Isa::Float (&of)[N]) {
#pragma GCC unroll 64
  for (int half = N / 2; half > 0; half /= 2) {
#pragma GCC unroll 64
    for (int i = 0; i < half; ++i) of[i] = Isa::add_float(of[i], of[i + half]);
  }
  return of[0];
}

// `count` values, fewer than a register holds, filled up with zeros.
template <class Isa, class T>
inline typename Isa::Float load_part(const T* p, int64_t count) {
  T padded[Isa::kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return Isa::load(padded);
}

template <class Isa>
struct WholeRegister {
  template <class T>
  static inline typename Isa::Float load(const T* p) {
    return Isa::load(p);
  }
  template <class T>
  static inline void store(T* p, typename Isa::Float x) {
    Isa::store(p, x);
  }
};

// The first `count` lanes; the others read 0 and are not written.
template <class Isa>
struct PartOfRegister {
  int64_t count;
  template <class T>
  inline typename Isa::Float load(const T* p) const {
    return load_part<Isa>(p, count);
  }
  template <class T>
  inline void store(T* p, typename Isa::Float x) const {
    T padded[Isa::kLanes];
    Isa::store(padded, x);
    memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
  }
};

// The lanes of a register from number `count` on, which is 0 to kLanes.
template <class Isa>
inline typename Isa::Mask lanes_from(int64_t count) {
  constexpr float kIn = 1.0f, kOut = -1.0f;
  static constexpr float kSigns[32] = {kIn,  kIn,  kIn,  kIn,  kIn,  kIn,  kIn,  kIn,
                                       kIn,  kIn,  kIn,  kIn,  kIn,  kIn,  kIn,  kIn,
                                       kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut,
                                       kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut};
  return Isa::is_negative(Isa::load(kSigns + 16 - count));
}

// The values as they are once stored as T, the type of the pointer.
template <class Isa, class T>
inline typename Isa::Float rounded(typename Isa::Float x, const T*) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  T stored[Isa::kLanes];
  Isa::store(stored, x);
  return Isa::load(stored);
}

// `to` as a pointer of the type of `like`.
template <class T>
inline T* typed_like(const T*, void* to) {
  return static_cast<T*>(to);
}

// Where a row begins, with `stride` bytes between rows.
inline const void* at_row(const void* first, int64_t row, int64_t stride) {
  return static_cast<const char*>(first) + row * stride;
}
inline void* at_row(void* first, int64_t row, int64_t stride) {
  return static_cast<char*>(first) + row * stride;
}

// f(i, part) for each register of n values, where `part` loads and stores what lies at i.
template <class Isa, class F>
inline void each_register(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) f(i, WholeRegister<Isa>());
  if (i < n) f(i, PartOfRegister<Isa>{n - i});
}

// f(i, isa, part) for the registers of n values from number i on, `Count` at once, a power of two,
// and where fewer are left, four. Gives how many values are done then.
template <class Isa, int Count, class F>
DYNQUANT_FLATTEN inline int64_t each_several_registers(int64_t i, int64_t n, const F& f) {
  using Several = typename SideBySide<Isa, Count>::Type;
  for (; i + Several::kLanes <= n; i += Several::kLanes) {
    f(i, Several(), WholeRegister<Several>());
  }
  if constexpr (Count > 4) return each_several_registers<Isa, Count / 2>(i, n, f);
  return i;
}

// f(i, isa, part) for n values, as many registers at once as `Count` says: `isa` is a value of the
// type whose operations work on what `part` loads. Where registers are arrays in memory, several of
// them gain nothing, and compile for minutes.
template <class Isa, int Count = 4, class F>
inline void each_registers(int64_t n, const F& f) {
  int64_t done = 0;
  if constexpr (!__is_class(typename Isa::Float))
    done = each_several_registers<Isa, Count>(0, n, f);
  each_register<Isa>(n - done, [&](int64_t i, auto part) { f(done + i, Isa(), part); });
}

}  // namespace
}  // namespace dynquant
