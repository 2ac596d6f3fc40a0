// Floats in rows as floats in columns, in blocks of four by four.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dynquant {
namespace {  // sources for different instruction sets include it

typedef float FourFloats __attribute__((vector_size(16)));

inline FourFloats load_four(const float* from) {
  FourFloats x;
  memcpy(&x, from, sizeof x);
  return x;
}
inline void store_four(const FourFloats& x, float* to) { memcpy(to, &x, sizeof x); }

// Four values of each of four rows become four values of each of four columns.
inline void transpose_four(FourFloats (&x)[4]) {
  const FourFloats low01 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const FourFloats low23 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const FourFloats high01 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const FourFloats high23 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

}  // namespace
}  // namespace dynquant
