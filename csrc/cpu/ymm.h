// The parts that the 256-bit sets share: everything but the product. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "gelu_table.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

struct Ymm {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;

  using Float = __m256;
  using Int = __m256i;
  using Mask = __m256;

  static inline Float load(const float* p) { return _mm256_loadu_ps(p); }
  static inline Float load(const Bfloat16* p) {
    // All eight in both halves, of which a half takes four, by one instruction beside the load.
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    constexpr char kZero = -1;
    const Int places = _mm256_setr_epi8(kZero, kZero, 0, 1, kZero, kZero, 2, 3, kZero, kZero, 4, 5,
                                        kZero, kZero, 6, 7, kZero, kZero, 8, 9, kZero, kZero, 10,
                                        11, kZero, kZero, 12, 13, kZero, kZero, 14, 15);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), places));
  }
  static inline Float load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static inline void store(Bfloat16* p, Float x) {
    const Int bits = _mm256_castps_si256(x);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    Int rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const Int quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan(x)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(_mm256_srli_epi32(rounded, 16)));
  }
  static inline void store(Half* p, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static inline Float in_register(Float x) {
    asm("" : "+x"(x));
    return x;
  }
  static inline Float set(float x) { return _mm256_set1_ps(x); }
  // Four bytes in every lane.
  static inline Int broadcast(const uint8_t* p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }
  static inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static inline Float swap_neighbors(Float x) { return _mm256_permute_ps(x, 0xB1); }
  static inline Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static inline Float add_float(Float a, Float b) { return _mm256_add_ps(a, b); }
  static inline Float sub_float(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static inline Float mul_add(Float a, Float b, Float to) { return _mm256_fmadd_ps(a, b, to); }
  static inline Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static inline Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static inline Mask unordered(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
  static inline Mask is_nan(Float a) { return unordered(a, a); }
  static inline Mask is_negative(Float a) { return a; }  // masks are read by their sign bits
  static inline Mask no_mask() { return _mm256_setzero_ps(); }
  static inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static inline bool any(Mask a) { return _mm256_movemask_ps(a) != 0; }
  static inline Float select(Mask mask, Float set, Float unset) {
    return _mm256_blendv_ps(unset, set, mask);
  }
  static inline Float least_magnitude(Float x, Float y) {
    const Float sign_bit = _mm256_set1_ps(-0.0f);
    return min(_mm256_andnot_ps(sign_bit, x), _mm256_andnot_ps(sign_bit, y));
  }
  static inline Float from_nearest(Float x) {
    const Float to_integer = set(kToInteger);
    return sub_float(x, sub_float(add_float(x, to_integer), to_integer));
  }
  static inline Float lookup(const float* table, Float x) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), _mm256_castps_si256(x));
  }
  static inline Int round_to_int(Float x) { return _mm256_cvtps_epi32(x); }
  static inline Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  static inline Float with_sign_of(Float magnitude, Float sign) {
    const Float sign_bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign_bit, magnitude), _mm256_and_ps(sign_bit, sign));
  }
  static inline Float power_of_two(Int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, set_int(127)), 23));
  }
  static inline float reduce_min(Float x) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
  }
  static inline float reduce_max(Float x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static inline float reduce_add(Float x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static inline Float reduce_adds(const Float (&x)[kLanes]) {
    Float halves[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Float a = x[i], b = x[4 + i];
      halves[i] =
          _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    const auto pairs = [&](int i) {
      const Float a = halves[i], b = halves[i + 1];
      return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xEE));
    };
    const Float a = pairs(0), b = pairs(2);
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
  }

  static inline Int load_int(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Int*>(p));
  }
  static inline void store_int(int32_t* p, Int x) {
    _mm256_storeu_si256(reinterpret_cast<Int*>(p), x);
  }
  static inline Int set_int(int32_t x) { return _mm256_set1_epi32(x); }
  static inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static inline Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static inline Int mul_int(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  static inline Int min_int(Int a, Int b) { return _mm256_min_epi32(a, b); }
  static inline Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static inline Int load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Int load_nibbles(const uint8_t* p, int64_t first) {
    int32_t pairs;
    memcpy(&pairs, p + first / 2, sizeof pairs);
    const __m128i words = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(pairs));
    const __m128i bytes =
        _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi8(15));
    return _mm256_cvtepu8_epi32(bytes);
  }
  static inline Int high_byte(Int x) { return _mm256_srli_epi32(x, 8); }
  static inline void store_bytes(uint8_t* p, Int x) {
    const __m128i words = low_halves(_mm256_and_si256(x, _mm256_set1_epi32(0xFF)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  template <bool Signed>
  static inline void store_saturated(uint8_t* p, Int a, Int b, Int c, Int d) {
    _mm256_storeu_si256(reinterpret_cast<Int*>(p), saturated<Signed>(a, b, c, d));
  }
  template <bool Signed>
  static inline void store_saturated(uint8_t* p, Int a, Int b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(saturated<Signed>(a, b, a, b)));
  }

 private:
  template <bool Signed>
  static inline Int saturated(Int a, Int b, Int c, Int d) {
    // Packing goes by 128 bits, so each of them holds four bytes of a, then of b, c and d.
    const Int ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    const Int bytes = Signed ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  // The lower 16 bits of each lane, whose upper 16 are zero.
  static inline __m128i low_halves(Int x) {
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  }
};

}  // namespace
}  // namespace dynquant
