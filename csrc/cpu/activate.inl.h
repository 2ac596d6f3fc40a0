// Sigmoid and tanh, written once over an `Isa` type: one polynomial and no fused multiply-add, so
// that every instruction set gives the same bits.
//
// Both follow from the exponential of a value that is not positive. With y = n * ln 2 + r and
// |r| <= ln 2 / 2,
//
//     exp(y) = 2^n * (1 + p),   p = r + r^2 * P(r) = exp(r) - 1,
//
// where P has degree 4 and a minimax fit of exp(r) - 1 leaves 1.4e-8. n * ln 2 is subtracted in two
// parts, of which the first is exact. Results differ from the real functions by 2.6 units in the
// last place at most, those of sigmoid below -86 by 1e-38. NaN gives NaN.
#pragma once

#include "kernels.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

// exp(y) = scale * (1 + p).
template <class Isa>
struct SplitExp {
  typename Isa::Float scale, p;

  // y in [-88, 0], or NaN. exp(-88) comes out as 0.
  explicit inline SplitExp(typename Isa::Float y) {
    using Float = typename Isa::Float;
    const typename Isa::Int n = Isa::round_to_int(Isa::mul(y, Isa::set(1.44269504f)));
    const Float whole = Isa::to_float(n);
    Float r = Isa::sub_float(y, Isa::mul(whole, Isa::set(0.693359375f)));
    r = Isa::sub_float(r, Isa::mul(whole, Isa::set(-2.12194440e-4f)));
    Float sum = Isa::set(1.3946553e-3f);
    sum = Isa::add_float(Isa::mul(sum, r), Isa::set(8.366644e-3f));
    sum = Isa::add_float(Isa::mul(sum, r), Isa::set(4.166628e-2f));
    sum = Isa::add_float(Isa::mul(sum, r), Isa::set(1.6666542e-1f));
    sum = Isa::add_float(Isa::mul(sum, r), Isa::set(0.5f));
    p = Isa::add_float(Isa::mul(sum, Isa::mul(r, r)), r);
    scale = Isa::power_of_two(n);
  }
};

// 1 / (1 + z) where x >= 0 and z / (1 + z) where x < 0, with z = exp(-|x|).
template <class Isa>
inline typename Isa::Float sigmoid(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float one = Isa::set(1.0f);
  const SplitExp<Isa> e(Isa::max(Isa::set(-88.0f), Isa::with_sign_of(x, Isa::set(-1.0f))));
  const Float z = Isa::add_float(e.scale, Isa::mul(e.scale, e.p));
  return Isa::div(Isa::select(Isa::is_negative(x), z, one), Isa::add_float(one, z));
}

// -t / (2 + t) with x's sign, where t = exp(-2 |x|) - 1. At |x| = 10 that is 1 already.
template <class Isa>
inline typename Isa::Float tanh(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float limited = Isa::max(Isa::set(-10.0f), Isa::with_sign_of(x, Isa::set(-1.0f)));
  const SplitExp<Isa> e(Isa::add_float(limited, limited));
  const Float t = Isa::add_float(Isa::mul(e.scale, e.p), Isa::sub_float(e.scale, Isa::set(1.0f)));
  return Isa::with_sign_of(Isa::div(t, Isa::add_float(Isa::set(2.0f), t)), x);
}

template <class Isa>
void activate(const ActivateArgs& a) {
  each_register<Isa>(a.n, [&a](int64_t i, auto part) {
    const typename Isa::Float x = part.load(a.x + i);
    part.store(a.y + i, a.function == Activation::tanh ? tanh<Isa>(x) : sigmoid<Isa>(x));
  });
}

}  // namespace
}  // namespace dynquant
