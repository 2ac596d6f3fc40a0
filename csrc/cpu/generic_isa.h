// An `Isa` type in plain C++ of any width and tile: the scalar set, and in tests the odd shapes
// that no processor has.
//
// What the algorithms require of an Isa:
//   kLanes           32-bit lanes of a register
//   kTileRows        rows of a tile, at most
//   kLongTileRows    the same where K is long, the weight outgrows the L2 cache and rows are few
//   kRegisters       registers that a tile may spend in all
//   kTemporaries     registers that a product takes beside its operands and its sum
//   kGroupBytes      bytes of a row's four k as `stage` lays them and `load_activation` reads them
//   kOffset          what `stage` takes from each byte
//   kReading         how weights are read
//   kKeepsWeights    whether weights stay in registers for all rows of a tile, or `dot` reads them
//   Float Int Mask   registers; Weights Activation, what `dot` takes
//   float part       load store in_register set mul div add_float sub_float mul_add min max is_nan
//                    unordered is_negative either any no_mask select with_sign_of
//                    least_magnitude from_nearest lookup round_to_int to_float power_of_two
//                    reduce_min reduce_max reduce_add reduce_adds
//   integer part     load_int store_int set_int add sub mul_int min_int max_int high_byte
//                    store_bytes store_saturated load_bytes load_nibbles
//   product          stage load_weights load_activation dot, and keep, which hides a value from
//                    the optimizer. stage gives what the products of those four k have too much in
//                    every column: 0 where kOffset is 0
// mul_add(a, b, c) is a * b + c, rounded once. in_register(x) is x, which the compiler may not read
// from memory again for each product that it is in.
// min and max give their second operand where either is NaN, which `unordered` detects. Integer
// arithmetic wraps. reduce_add adds the upper half of the lanes to the lower until one is left,
// reduce_adds does so for each of kLanes registers and gives the register of what they leave.
// is_negative reads the sign bit, with_sign_of(a, b) is a's magnitude with b's sign bit, and
// power_of_two(n) is 2^n for n in -126..127, 0 for -127, and any value for other n.
// least_magnitude(a, b) is min of both without their signs, where b is no NaN and a no signaling
// one. from_nearest(x) is what x, of less than 2^22, has beyond the nearest whole number, the even
// one of two. lookup(table, x) takes from kTableEntries floats, aligned to 32 bytes, those whose
// numbers are the lowest bits of x's lanes. store_bytes stores the lowest byte of each lane,
// high_byte moves the one above it there. store_saturated stores the lanes of two or four registers
// limited to 0..255, or, signed, to -128..127. load_nibbles(p, i) takes four bits each, from number
// i of those at p, the lower of a byte first; i is even unless kLanes is 1. kLanes divides 16.
#pragma once

#include <cmath>

#include "convert.h"
#include "gelu_table.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

template <int Lanes, int Rows, int Registers>
struct GenericIsa {
  static constexpr int kLanes = Lanes;
  static constexpr int kTileRows = Rows;
  static constexpr int kLongTileRows = kTileRows;
  static constexpr int kRegisters = Registers;
  static constexpr int kTemporaries = 0;
  static constexpr int kOffset = 0;
  static constexpr bool kKeepsWeights = true;
  static constexpr Reading kReading = {4, 2, 0, true};
  static constexpr int kGroupBytes = kGroup;
  // Measured as the set `scalar` on an Intel Cascade Lake of 2.5 GHz.
  static constexpr Costs kCosts = {0.4, 0.33, 4.8, 65.0};
  static constexpr Costs kHalfCosts = {0.3, 0.3, 0.0, 60.0};

  struct Float {
    float v[Lanes];
  };
  struct Int {
    int32_t v[Lanes];
  };
  using Mask = Int;
  struct Weights {
    int8_t v[Lanes][kGroup];
  };
  struct Activation {
    uint8_t v[kGroup];
  };

  template <class R, class F>
  static inline R each(F f) {
    R result;
    for (int i = 0; i < Lanes; ++i) result.v[i] = f(i);
    return result;
  }
  static inline int32_t wrapped(int64_t value) {
    return static_cast<int32_t>(static_cast<uint32_t>(value));
  }

  template <class T>
  static inline Float load(const T* p) {
    return each<Float>([=](int i) { return widen(p[i]); });
  }
  template <class T>
  static inline void store(T* p, Float x) {
    for (int i = 0; i < Lanes; ++i) narrow(x.v[i], p + i);
  }
  static inline Float in_register(Float x) { return x; }
  static inline Float set(float x) {
    return each<Float>([=](int) { return x; });
  }
  static inline Float mul(Float a, Float b) {
    return each<Float>([=](int i) { return a.v[i] * b.v[i]; });
  }
  static inline Float swap_neighbors(Float x) {
    static_assert(Lanes % 2 == 0, "a register of pairs");
    return each<Float>([=](int i) { return x.v[i ^ 1]; });
  }
  static inline Float div(Float a, Float b) {
    return each<Float>([=](int i) { return a.v[i] / b.v[i]; });
  }
  static inline Float add_float(Float a, Float b) {
    return each<Float>([=](int i) { return a.v[i] + b.v[i]; });
  }
  static inline Float sub_float(Float a, Float b) {
    return each<Float>([=](int i) { return a.v[i] - b.v[i]; });
  }
  static inline Float mul_add(Float a, Float b, Float to) {
    return each<Float>([=](int i) { return std::fma(a.v[i], b.v[i], to.v[i]); });
  }
  static inline Float min(Float a, Float b) {
    return each<Float>([=](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static inline Float max(Float a, Float b) {
    return each<Float>([=](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static inline Mask unordered(Float a, Float b) { return either(is_nan(a), is_nan(b)); }
  static inline Mask is_nan(Float a) {
    return each<Mask>([=](int i) { return a.v[i] != a.v[i] ? 1 : 0; });
  }
  static inline Mask is_negative(Float a) {
    return each<Mask>([=](int i) { return static_cast<int32_t>(bits_of(a.v[i]) >> 31); });
  }
  static inline Mask no_mask() { return set_int(0); }
  static inline Mask either(Mask a, Mask b) {
    return each<Mask>([=](int i) { return a.v[i] | b.v[i]; });
  }
  static inline bool any(Mask a) {
    int32_t found = 0;
    for (int i = 0; i < Lanes; ++i) found |= a.v[i];
    return found != 0;
  }
  static inline Float select(Mask mask, Float set, Float unset) {
    return each<Float>([=](int i) { return mask.v[i] ? set.v[i] : unset.v[i]; });
  }
  static inline Float least_magnitude(Float x, Float y) {
    return min(with_sign_of(x, set(0.0f)), with_sign_of(y, set(0.0f)));
  }
  static inline Float from_nearest(Float x) {
    return each<Float>([=](int i) { return x.v[i] - ((x.v[i] + kToInteger) - kToInteger); });
  }
  static inline Float lookup(const float* table, Float x) {
    return each<Float>([=](int i) { return table[bits_of(x.v[i]) % kTableEntries]; });
  }
  static inline Int round_to_int(Float x) {
    return each<Int>([=](int i) { return static_cast<int32_t>(lrintf(x.v[i])); });
  }
  static inline Float to_float(Int x) {
    return each<Float>([=](int i) { return static_cast<float>(x.v[i]); });
  }
  static inline Float with_sign_of(Float magnitude, Float sign) {
    return each<Float>([=](int i) {
      return float_of((bits_of(magnitude.v[i]) & 0x7FFFFFFFu) | (bits_of(sign.v[i]) & 0x80000000u));
    });
  }
  static inline Float power_of_two(Int n) {
    return each<Float>(
        [=](int i) { return float_of((static_cast<uint32_t>(n.v[i]) + 127u) << 23); });
  }
  static inline float reduce_min(Float x) {
    float result = x.v[0];
    for (int i = 1; i < Lanes; ++i) result = x.v[i] < result ? x.v[i] : result;
    return result;
  }
  static inline float reduce_max(Float x) {
    float result = x.v[0];
    for (int i = 1; i < Lanes; ++i) result = x.v[i] > result ? x.v[i] : result;
    return result;
  }
  static inline float reduce_add(Float x) {
    for (int step = Lanes / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) x.v[i] += x.v[i + step];
    }
    return x.v[0];
  }
  static inline Float reduce_adds(const Float (&x)[Lanes]) {
    Float sums;
    for (int i = 0; i < Lanes; ++i) sums.v[i] = reduce_add(x[i]);
    return sums;
  }

  static inline Int load_int(const int32_t* p) {  // column sums lie wherever the packed bytes do
    Int x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static inline void store_int(int32_t* p, Int x) {
    for (int i = 0; i < Lanes; ++i) p[i] = x.v[i];
  }
  static inline Int set_int(int32_t x) {
    return each<Int>([=](int) { return x; });
  }
  static inline Int add(Int a, Int b) {
    return each<Int>([=](int i) { return wrapped(int64_t{a.v[i]} + b.v[i]); });
  }
  static inline Int sub(Int a, Int b) {
    return each<Int>([=](int i) { return wrapped(int64_t{a.v[i]} - b.v[i]); });
  }
  static inline Int mul_int(Int a, Int b) {
    return each<Int>([=](int i) { return wrapped(int64_t{a.v[i]} * b.v[i]); });
  }
  static inline Int min_int(Int a, Int b) {
    return each<Int>([=](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static inline Int max_int(Int a, Int b) {
    return each<Int>([=](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static inline Int load_bytes(const uint8_t* p) {
    return each<Int>([=](int i) { return int32_t{p[i]}; });
  }
  static inline Int load_nibbles(const uint8_t* p, int64_t first) {
    return each<Int>([=](int i) {
      const int64_t at = first + i;
      return (p[at / 2] >> (at % 2 * 4)) & 15;
    });
  }
  static inline Int high_byte(Int x) {
    return each<Int>([=](int i) { return x.v[i] >> 8; });
  }
  static inline void store_bytes(uint8_t* p, Int x) {
    for (int i = 0; i < Lanes; ++i) p[i] = static_cast<uint8_t>(x.v[i]);
  }
  template <bool Signed>
  static inline void store_saturated(uint8_t* p, Int a, Int b, Int c, Int d) {
    store_saturated<Signed>(p, a, b);
    store_saturated<Signed>(p + 2 * Lanes, c, d);
  }
  template <bool Signed>
  static inline void store_saturated(uint8_t* p, Int a, Int b) {
    constexpr int32_t kLeast = Signed ? -128 : 0, kMost = kLeast + 255;
    for (int i = 0; i < 2 * Lanes; ++i) {
      const int32_t value = i < Lanes ? a.v[i] : b.v[i - Lanes];
      p[i] = static_cast<uint8_t>(value < kLeast ? kLeast : value > kMost ? kMost : value);
    }
  }

  static inline int32_t stage(const uint8_t* q, int64_t groups, uint8_t* staged) {
    memcpy(staged, q, static_cast<size_t>(groups * kGroup));
    return 0;
  }
  static inline Weights load_weights(const int8_t* p) {
    Weights w;
    memcpy(&w, p, sizeof w);
    return w;
  }
  static inline Activation load_activation(const uint8_t* p) {
    Activation a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  static inline Weights keep(Weights w) {
    asm volatile("" : "+m"(w));
    return w;
  }
  static inline Int dot(Int acc, Activation a, Weights w) {
    return each<Int>([=](int i) {
      int32_t sum = 0;
      for (int j = 0; j < kGroup; ++j) sum += int32_t{a.v[j]} * w.v[i][j];
      return wrapped(int64_t{acc.v[i]} + sum);
    });
  }
};

}  // namespace
}  // namespace dynquant
