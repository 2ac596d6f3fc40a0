// Layer norm, RMS norm and softmax of a row, written once over an `Isa` type.
//
// Every sum over a row is 16 partial sums, of which number j takes the values j, j + 16, ... in
// turn; then j takes in j + 8, j + 4, j + 2, j + 1. So the bits are the same on every instruction
// set.
#pragma once

#include <math.h>

#include <algorithm>

#include "activate.inl.h"
#include "kernels.h"
#include "quantize.inl.h"
#include "registers.inl.h"
#include "rows.inl.h"

namespace dynquant {
namespace {

template <class Isa, int Parts = static_cast<int>(kPartials) / Isa::kLanes>
class RowSum {
 public:
  static constexpr int kParts = Parts;

  inline RowSum() {
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) sums_[i] = Isa::set(0.0f);
  }
  // Takes in value number 16 * i + part * kLanes and those that follow it.
  inline void add(int part, typename Isa::Float values) {
    sums_[part] = Isa::add_float(sums_[part], values);
  }
  // One register of which reduce_add gives the sum.
  inline typename Isa::Float joined() { return sum_by_halves<Isa>(sums_); }

 private:
  typename Isa::Float sums_[kParts];
};

// f(p, i, part) for the registers of n values, filled up to whole groups of kPartials: `part` loads
// and stores what there is from number i on, and p is the part of a sum that takes it in.
template <class Isa, class F>
inline void each_part(int64_t n, const F& f) {
  constexpr int kParts = RowSum<Isa>::kParts;
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials) {
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) f(p, i + p * Isa::kLanes, WholeRegister<Isa>());
  }
  if (i == n) return;
#pragma GCC unroll 16
  for (int p = 0; p < kParts; ++p, i += Isa::kLanes) {
    f(p, i, PartOfRegister<Isa>{std::clamp<int64_t>(n - i, 0, Isa::kLanes)});
  }
}

// x, with `behind` in the lanes that are no part.
template <class Together, class Float>
inline Float filled_up(Float x, Float, WholeRegister<typename Together::One>) {
  return x;
}
template <class Together, class Float>
inline Float filled_up(Float x, Float behind, PartOfRegister<typename Together::One> part) {
  const auto is_behind = Together::same_mask(lanes_from<typename Together::One>(part.count));
  return Together::Isa::select(is_behind, behind, x);
}

// out[r] = the sum over row r of what f(i, part) gives: a register of each row's terms, from number
// i on, of which `part` loads and stores what is there.
template <class Isa, class Together, class F>
inline void sums_over(int64_t n, const F& f, float* out) {
  using Many = typename Together::Isa;
  RowSum<Many, RowSum<Isa>::kParts> sum;
  each_part<Isa>(n, [&](int p, int64_t i, auto part) {
    sum.add(p, filled_up<Together>(f(i, part), Many::set(0.0f), part));
  });
  Together::reduce(sum.joined(), &Isa::reduce_add, out);
}

// (x - mean) / sqrt(variance + eps), or x / sqrt(mean square + eps), of some rows, with a residual
// added to x before.
template <class Isa, class Together, class T>
inline void norm_rows(const NormArgs& a, const T*, int64_t first, Together) {
  using Many = typename Together::Isa;
  using Float = typename Many::Float;
  constexpr int kRows = Together::kRows;
  const bool adds = a.residual != nullptr;
  const T* x[kRows];
  const T* residual[kRows];
  T* y[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    x[r] = static_cast<const T*>(at_row(a.x, row, a.x_stride));
    y[r] = static_cast<T*>(at_row(a.y, row, a.y_stride));
    residual[r] = adds ? static_cast<const T*>(at_row(a.residual, row, a.residual_stride)) : x[r];
  }
  const auto summed = [&](int64_t i, auto part) {
    const Float value = Together::load(x, i, part);
    if (!adds) return value;
    const Float sum = Many::add_float(Together::load(residual, i, part), value);
    Together::store(y, i, sum, part);
    return rounded<Many>(sum, x[0]);
  };
  if (a.norm == Norm::none) {
    if (adds) {
      each_register<Isa>(a.n, [&](int64_t i, auto part) { summed(i, part); });
      return;
    }
    for (int r = 0; r < kRows; ++r) {
      if (x[r] != y[r]) memcpy(y[r], x[r], static_cast<size_t>(a.n) * sizeof(T));
    }
    return;
  }
  const auto reread = [&](int64_t i, auto part) {
    return adds ? Together::load(y, i, part) : Together::load(x, i, part);
  };
  const float count = static_cast<float>(a.n);
  float values[kRows];
  Float mean = Many::set(0.0f);
  const auto sum_squares = [&](const auto& read) {
    const auto square = [&](int64_t i, auto part) {
      const Float distance = Many::sub_float(read(i, part), mean);
      return Many::mul(distance, distance);
    };
    sums_over<Isa, Together>(a.n, square, values);
  };
  if (a.norm == Norm::layer) {
    sums_over<Isa, Together>(a.n, summed, values);
    for (float& value : values) value /= count;
    mean = Together::of(values);
    sum_squares(reread);
  } else {
    sum_squares(summed);
  }
  for (float& value : values) value = 1.0f / sqrtf(value / count + a.eps);
  const Float inverse = Together::of(values);
  const bool adds_one = a.norm == Norm::rms_plus_one;
  each_register<Isa>(a.n, [&](int64_t i, auto part) {
    Float value = Many::mul(Many::sub_float(reread(i, part), mean), inverse);
    if (a.weight != nullptr) {
      typename Isa::Float weight = part.load(a.weight + i);
      if (adds_one) weight = Isa::add_float(Isa::set(1.0f), weight);
      value = Many::mul(value, Together::same(weight));
    }
    if (a.bias != nullptr) value = Many::add_float(value, Together::same(part.load(a.bias + i)));
    Together::store(y, i, value, part);
  });
}

template <class Isa>
void norm(const NormArgs& a) {
  with_type(a.x, a.dtype, [&](const auto* x) {
    each_rows<Isa, 4>(a.rows,
                      [&](int64_t row, auto together) { norm_rows<Isa>(a, x, row, together); });
  });
}

// The largest value, NaN left out; -Inf where there is none.
template <class Isa, class T>
inline float greatest(const T* x, int64_t n) {
  typename Isa::Float most = Isa::set(-INFINITY);
  int64_t i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) most = Isa::max(Isa::load(x + i), most);
  float result = Isa::reduce_max(most);
  for (; i < n; ++i) result = widen(x[i]) > result ? widen(x[i]) : result;
  return result;
}

// exp(x) for x <= 0 or NaN; below -88 it is 0, as exp(-88) is.
template <class Isa>
inline typename Isa::Float exp_of(typename Isa::Float x) {
  return SplitExp<Isa>(Isa::max(Isa::set(-88.0f), x)).value();
}

template <class Isa, class T>
inline void softmax_row(const SoftmaxArgs& a, const T* x, T* y) {
  using Float = typename Isa::Float;
  const Float most = Isa::set(greatest<Isa>(x, a.n));
  const auto exp_from_most = [&](int64_t i, auto part) {
    return exp_of<Isa>(Isa::sub_float(part.load(x + i), most));
  };
  float sum;
  sums_over<Isa, Rows<Isa, 1>>(a.n, exp_from_most, &sum);
  const Float divisor = Isa::set(sum);
  each_register<Isa>(a.n, [&](int64_t i, auto part) {
    part.store(y + i, Isa::div(exp_from_most(i, part), divisor));
  });
}

template <class Isa>
void softmax(const SoftmaxArgs& a) {
  with_type(a.x, a.dtype, [&](const auto* x) { softmax_row<Isa>(a, x, typed_like(x, a.y)); });
}

}  // namespace
}  // namespace dynquant
