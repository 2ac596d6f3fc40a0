// fp32 to and from the 16-bit formats by integer arithmetic: the tails and the sets without the
// instructions use these. Everything is static, so that a file built for a wide instruction set
// shares no code with another.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dynquant {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return value; }
inline float widen(Bfloat16 value) { return float_of(uint32_t{value.bits} << 16); }
inline float widen(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

// n values that lie `stride` bytes apart, as fp32.
template <class T>
inline void widen_strided(const char* from, int64_t stride, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    T value;
    memcpy(&value, from + i * stride, sizeof value);
    to[i] = widen(value);
  }
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, Bfloat16* out) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float value, Half* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    half = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal halves: round the 13 bits that fall off
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Adding 0.5 aligns the value so that fp32's own rounding drops what a subnormal half cannot
    // hold.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace dynquant
