// Functions of one value, with the operations of the kernels in the same order.
#pragma once

#include <cmath>

namespace dynquant {

struct Exp {
  float scale, p;

  explicit Exp(float y) {
    const float n = std::nearbyint(y * 1.44269504f);
    const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    float sum = 1.3946553e-3f;
    for (float c : {8.366644e-3f, 4.166628e-2f, 1.6666542e-1f, 0.5f}) sum = sum * r + c;
    p = sum * (r * r) + r;
    scale = n <= -127.0f ? 0.0f : std::ldexp(1.0f, n != n ? 0 : static_cast<int>(n));
  }
};

inline float sigmoid_of(float x) {
  const Exp e(x != x ? x : std::fmax(-88.0f, -std::fabs(x)));
  const float z = e.scale + e.scale * e.p;
  return (std::signbit(x) ? z : 1.0f) / (1.0f + z);
}

inline float tanh_of(float x) {
  const float limited = x != x ? x : std::fmax(-10.0f, -std::fabs(x));
  const Exp e(limited + limited);
  const float t = e.scale * e.p + (e.scale - 1.0f);
  return std::copysign(t / (2.0f + t), x);
}

}  // namespace dynquant
