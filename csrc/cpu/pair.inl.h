// Two registers as if they were one. A long chain of operations on a single register leaves the
// units waiting: the steps of several chains, one next to the other, fill them.
#pragma once

#include <stdint.h>

#include "flatten.h"

namespace dynquant {
namespace {

// Half is an `Isa` type, or a pair of them.
template <class Half>
struct Pair {
  static constexpr int kLanes = 2 * Half::kLanes;

  struct Float {
    typename Half::Float first, second;
  };
  struct Int {
    typename Half::Int first, second;
  };
  struct Mask {
    typename Half::Mask first, second;
  };

  template <class T>
  static inline Float load(const T* p) {
    return {Half::load(p), Half::load(p + Half::kLanes)};
  }
  template <class T>
  static inline void store(T* p, Float x) {
    Half::store(p, x.first);
    Half::store(p + Half::kLanes, x.second);
  }
  static inline Float set(float x) { return {Half::set(x), Half::set(x)}; }
  static inline Float mul(Float a, Float b) {
    return {Half::mul(a.first, b.first), Half::mul(a.second, b.second)};
  }
  static inline Float div(Float a, Float b) {
    return {Half::div(a.first, b.first), Half::div(a.second, b.second)};
  }
  static inline Float add_float(Float a, Float b) {
    return {Half::add_float(a.first, b.first), Half::add_float(a.second, b.second)};
  }
  static inline Float sub_float(Float a, Float b) {
    return {Half::sub_float(a.first, b.first), Half::sub_float(a.second, b.second)};
  }
  static inline Float mul_add(Float a, Float b, Float to) {
    return {Half::mul_add(a.first, b.first, to.first),
            Half::mul_add(a.second, b.second, to.second)};
  }
  static inline Float min(Float a, Float b) {
    return {Half::min(a.first, b.first), Half::min(a.second, b.second)};
  }
  static inline Float max(Float a, Float b) {
    return {Half::max(a.first, b.first), Half::max(a.second, b.second)};
  }
  static inline Mask is_negative(Float a) {
    return {Half::is_negative(a.first), Half::is_negative(a.second)};
  }
  static inline Float select(Mask mask, Float set, Float unset) {
    return {Half::select(mask.first, set.first, unset.first),
            Half::select(mask.second, set.second, unset.second)};
  }
  static inline Float with_sign_of(Float magnitude, Float sign) {
    return {Half::with_sign_of(magnitude.first, sign.first),
            Half::with_sign_of(magnitude.second, sign.second)};
  }
  static inline Float least_magnitude(Float x, Float y) {
    return {Half::least_magnitude(x.first, y.first), Half::least_magnitude(x.second, y.second)};
  }
  static inline Float from_nearest(Float x) {
    return {Half::from_nearest(x.first), Half::from_nearest(x.second)};
  }
  static inline Float lookup(const float* table, Float x) {
    return {Half::lookup(table, x.first), Half::lookup(table, x.second)};
  }
  static inline Int round_to_int(Float x) {
    return {Half::round_to_int(x.first), Half::round_to_int(x.second)};
  }
  static inline Float to_float(Int x) {
    return {Half::to_float(x.first), Half::to_float(x.second)};
  }
  static inline Float power_of_two(Int n) {
    return {Half::power_of_two(n.first), Half::power_of_two(n.second)};
  }
};

// `Count` registers as if they were one, a power of two.
template <class Isa, int Count>
struct SideBySide {
  using Type = Pair<typename SideBySide<Isa, Count / 2>::Type>;
};
template <class Isa>
struct SideBySide<Isa, 1> {
  using Type = Isa;
};

}  // namespace
}  // namespace dynquant
