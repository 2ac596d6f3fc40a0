// Loops over fp32 arrays by whole registers, with a last one that is filled up.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dynquant {
namespace {

// `count` values, fewer than a register holds, filled up with zeros.
template <class Isa, class T>
inline typename Isa::Float load_part(const T* p, int64_t count) {
  T padded[Isa::kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return Isa::load(padded);
}

template <class Isa>
struct WholeRegister {
  static inline typename Isa::Float load(const float* p) { return Isa::load(p); }
  static inline void store(float* p, typename Isa::Float x) { Isa::store(p, x); }
};

// The first `count` lanes; the others read 0 and are not written.
template <class Isa>
struct PartOfRegister {
  int64_t count;
  inline typename Isa::Float load(const float* p) const { return load_part<Isa>(p, count); }
  inline void store(float* p, typename Isa::Float x) const {
    float padded[Isa::kLanes];
    Isa::store(padded, x);
    memcpy(p, padded, static_cast<size_t>(count) * sizeof(float));
  }
};

// f(i, part) for each register of n values, where `part` loads and stores what lies at i.
template <class Isa, class F>
inline void each_register(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) f(i, WholeRegister<Isa>());
  if (i < n) f(i, PartOfRegister<Isa>{n - i});
}

}  // namespace
}  // namespace dynquant
