// The parts that the 512-bit sets share: everything but the product. Needs AVX-512 F, BW, VL, DQ.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

struct Zmm {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kOffset = 0;

  using Float = __m512;
  using Int = __m512i;
  using Mask = __mmask16;

  static inline Float load(const float* p) { return _mm512_loadu_ps(p); }
  static inline Float load(const Bfloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static inline Float load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Float load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static inline void store(Bfloat16* p, Float x) {
    const Int bits = _mm512_castps_si512(x);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    Int rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    rounded = _mm512_mask_or_epi32(rounded, is_nan(x), bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static inline void store(Half* p, Float x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline Float in_register(Float x) {
    asm("" : "+v"(x));
    return x;
  }
  static inline Float set(float x) { return _mm512_set1_ps(x); }
  static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static inline Float swap_neighbors(Float x) { return _mm512_permute_ps(x, 0xB1); }
  static inline Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static inline Float add_float(Float a, Float b) { return _mm512_add_ps(a, b); }
  static inline Float sub_float(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static inline Float mul_add(Float a, Float b, Float to) { return _mm512_fmadd_ps(a, b, to); }
  static inline Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static inline Mask unordered(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static inline Mask is_nan(Float a) { return unordered(a, a); }
  static inline Mask is_negative(Float a) { return _mm512_movepi32_mask(_mm512_castps_si512(a)); }
  static inline Mask no_mask() { return 0; }
  static inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static inline bool any(Mask a) { return a != 0; }
  static inline Float select(Mask mask, Float set, Float unset) {
    return _mm512_mask_mov_ps(unset, mask, set);
  }
  static inline Float least_magnitude(Float x, Float y) {
    constexpr int kLeastMagnitude = 2, kWithoutSign = 2 << 2;
    return _mm512_range_ps(x, y, kLeastMagnitude | kWithoutSign);
  }
  static inline Float from_nearest(Float x) { return _mm512_reduce_ps(x, 0); }
  static inline Float lookup(const float* table, Float x) {
    const Float twice = _mm512_broadcast_f32x8(_mm256_load_ps(table));
    return _mm512_permutexvar_ps(_mm512_castps_si512(x), twice);
  }
  static inline Int round_to_int(Float x) { return _mm512_cvtps_epi32(x); }
  static inline Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  static inline Float with_sign_of(Float magnitude, Float sign) {
    const Int sign_bit = _mm512_set1_epi32(INT32_MIN);
    constexpr int kChosenByFirst = 0xCA;  // first ? second : third, for each bit
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        sign_bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), kChosenByFirst));
  }
  static inline Float power_of_two(Int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
  static inline float reduce_min(Float x) { return _mm512_reduce_min_ps(x); }
  static inline float reduce_max(Float x) { return _mm512_reduce_max_ps(x); }
  static inline float reduce_add(Float x) {
    const __m256 low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
    const __m256 half = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static inline Float reduce_adds(const Float (&x)[kLanes]) {
    Float quarters[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      // By halves, then by quarters, of which one of each of four registers is left.
      const auto halves = [&](int first) {
        const Float a = x[first + i], b = x[first + 4 + i];
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
      };
      const Float a = halves(0), b = halves(8);
      quarters[i] =
          _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    const auto pairs = [&](int i) {
      const Float a = quarters[i], b = quarters[i + 1];
      return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    };
    const Float a = pairs(0), b = pairs(2);
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  }

  static inline Int load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static inline void store_int(int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
  static inline Int set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static inline Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static inline Int mul_int(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  static inline Int min_int(Int a, Int b) { return _mm512_min_epi32(a, b); }
  static inline Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static inline Int load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Int load_nibbles(const uint8_t* p, int64_t first) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + first / 2));
    const __m128i words = _mm_cvtepu8_epi16(pairs);
    const __m128i bytes =
        _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi8(15));
    return _mm512_cvtepu8_epi32(bytes);
  }
  static inline Int high_byte(Int x) { return _mm512_srli_epi32(x, 8); }
  static inline void store_bytes(uint8_t* p, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
  }
  template <bool Signed>
  static inline void store_saturated(uint8_t* p, Int a, Int b, Int c, Int d) {
    _mm512_storeu_si512(p, saturated<Signed>(a, b, c, d));
  }
  template <bool Signed>
  static inline void store_saturated(uint8_t* p, Int a, Int b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_castsi512_si256(saturated<Signed>(a, b, a, b)));
  }

 private:
  template <bool Signed>
  static inline Int saturated(Int a, Int b, Int c, Int d) {
    // Packing goes by 128 bits, so each of them holds four bytes of a, then of b, c and d.
    const Int ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    const Int bytes = Signed ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
    const Int in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(in_order, bytes);
  }
};

}  // namespace
}  // namespace dynquant
