// Activation functions, written once over an `Isa` type: polynomials and no fused multiply-add, so
// that every instruction set gives the same bits.
//
// Sigmoid and tanh follow from the exponential of a value that is not positive. With y = n * ln 2 +
// r and |r| <= ln 2 / 2,
//
//     exp(y) = 2^n * (1 + p),   p = r + r^2 * P(r) = exp(r) - 1,
//
// where P has degree 4 and a minimax fit of exp(r) - 1 leaves 1.4e-8. n * ln 2 is subtracted in two
// parts, of which the first is exact. Results differ from the real functions by 2.6 units in the
// last place at most, those of sigmoid below -86 by 1e-38. NaN gives NaN.
#pragma once

#include "gelu_table.h"
#include "kernels.h"
#include "quantize.inl.h"
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

  inline typename Isa::Float value() const { return Isa::add_float(scale, Isa::mul(scale, p)); }
};

// exp(x), by 1 / exp(-x) where x has no minus: 0 from -88 down, and Inf from 88 on.
template <class Isa>
inline typename Isa::Float factor_of(typename Isa::Float x) {
  const auto below = Isa::max(Isa::set(-88.0f), Isa::with_sign_of(x, Isa::set(-1.0f)));
  const auto factor = SplitExp<Isa>(below).value();
  return Isa::select(Isa::is_negative(x), factor, Isa::div(Isa::set(1.0f), factor));
}

// 1 / (1 + z) where x >= 0 and z / (1 + z) where x < 0, with z = exp(-|x|).
template <class Isa>
inline typename Isa::Float sigmoid(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float one = Isa::set(1.0f);
  const SplitExp<Isa> e(Isa::max(Isa::set(-88.0f), Isa::with_sign_of(x, Isa::set(-1.0f))));
  const Float z = e.value();
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

// For x > 0 within 2.5 units in the last place of x / 2 * (1 + erf(x / sqrt 2)), and everywhere
// within 1e-7 * max(1, |x|), below -5.33 by 2.6e-7.
template <class Isa>
inline typename Isa::Float gelu(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float a = Isa::least_magnitude(Isa::mul(x, Isa::set(kGeluRanges)), Isa::set(kGeluLast));
  const Float range = Isa::add_float(a, Isa::set(kToInteger));  // its number in the lowest bits
  const Float t = Isa::from_nearest(a);
  Float sum = Isa::lookup(kGeluFactors[kGeluPowers - 1], range);
#pragma GCC unroll 8
  for (int j = kGeluPowers - 2; j >= 0; --j) {
    sum = Isa::add_float(Isa::mul(sum, t), Isa::lookup(kGeluFactors[j], range));
  }
  return Isa::sub_float(Isa::max(Isa::set(0.0f), x), sum);
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
template <class Isa>
inline typename Isa::Float gelu_tanh(typename Isa::Float x) {
  using Float = typename Isa::Float;
  const Float cubic = Isa::mul(Isa::mul(Isa::mul(Isa::set(0.044715f), x), x), x);
  const Float inner = Isa::mul(Isa::set(0.79788456f), Isa::add_float(x, cubic));
  return Isa::mul(Isa::mul(Isa::set(0.5f), x), Isa::add_float(Isa::set(1.0f), tanh<Isa>(inner)));
}

// f(at_once, function), where `function(isa, x)` gives the activation function of x, a register of
// that type, and Count at_once says how many registers go through it next to each other: a chain of
// dependent steps is long, and a processor does not look far enough ahead for the next one. For
// gelu, whose steps need three registers each, AVX2 has too few for eight (4 percent slower).
template <class Isa, class F>
inline void with_function(Activation function, const F& f) {
  constexpr Count<8> kEight;
  constexpr Count<(Isa::kRegisters < 32 ? 4 : 8)> kOfThree;
  switch (function) {
    case Activation::none:
      return f(kEight, [](auto, auto x) { return x; });
    case Activation::gelu:
      return f(kOfThree, [](auto isa, auto x) { return gelu<decltype(isa)>(x); });
    case Activation::gelu_tanh:
      return f(kEight, [](auto isa, auto x) { return gelu_tanh<decltype(isa)>(x); });
    case Activation::silu:
      return f(kEight, [](auto isa, auto x) { return isa.mul(x, sigmoid<decltype(isa)>(x)); });
    case Activation::relu:  // max gives its second operand where that is NaN
      return f(kEight, [](auto isa, auto x) { return isa.max(isa.set(0.0f), x); });
    case Activation::quick_gelu:
      return f(kEight, [](auto isa, auto x) {
        return isa.mul(x, sigmoid<decltype(isa)>(isa.mul(isa.set(1.702f), x)));
      });
    case Activation::sigmoid:
      return f(kEight, [](auto isa, auto x) { return sigmoid<decltype(isa)>(x); });
    case Activation::tanh:
      return f(kEight, [](auto isa, auto x) { return tanh<decltype(isa)>(x); });
    case Activation::relu_squared:
      return f(kEight, [](auto isa, auto x) {
        const auto above = isa.max(isa.set(0.0f), x);
        return isa.mul(above, above);
      });
  }
}

template <class Isa>
void activate(const ActivateArgs& a) {
  with_function<Isa>(a.function, [&](auto at_once, auto function) {
    with_type(a.x, a.dtype, [&](const auto* x) {
      const auto* by = static_cast<decltype(x)>(a.by);
      auto* y = typed_like(x, a.y);
      each_registers<Isa, at_once.kCount>(a.n, [&](int64_t i, auto isa, auto part) {
        const auto value = function(isa, part.load(x + i));
        if (by == nullptr) return part.store(y + i, value);
        part.store(y + i, isa.mul(rounded<decltype(isa)>(value, x), part.load(by + i)));
      });
    });
  });
}

}  // namespace
}  // namespace dynquant
