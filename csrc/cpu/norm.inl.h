// Layer norm, RMS norm and softmax of a row, written once over an `Isa` type.
//
// Every sum over a row is 16 partial sums, of which number j takes the values j, j + 16, ... in
// turn; then j takes in j + 8, j + 4, j + 2, j + 1. So the bits are the same on every instruction
// set.
#pragma once

#include <math.h>

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
  inline typename Isa::Float joined() {
#pragma GCC unroll 4
    for (int step = kParts / 2; step > 0; step /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < step; ++i) sums_[i] = Isa::add_float(sums_[i], sums_[i + step]);
    }
    return sums_[0];
  }
  inline float total() { return Isa::reduce_add(joined()); }

 private:
  typename Isa::Float sums_[kParts];
};

// out[r] = the sum of f(r, value) over row r, for R rows at once: the sum of one alone waits for
// each addition.
template <class Isa, int R, class T, class F>
inline void sums_over(const T* const (&x)[R], int64_t n, F f, float (&out)[R]) {
  RowSum<Isa> sum[R];
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials) {
#pragma GCC unroll 16
    for (int part = 0; part < RowSum<Isa>::kParts; ++part) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r].add(part, f(r, Isa::load(x[r] + i + part * Isa::kLanes)));
    }
  }
  if (i < n) {
    for (int r = 0; r < R; ++r) {
      T values[kPartials] = {};
      float terms[kPartials];
      memcpy(values, x[r] + i, static_cast<size_t>(n - i) * sizeof(T));
      for (int64_t j = 0; j < kPartials; j += Isa::kLanes) {
        Isa::store(terms + j, f(r, Isa::load(values + j)));
      }
      for (int64_t j = n - i; j < kPartials; ++j) terms[j] = 0.0f;
#pragma GCC unroll 16
      for (int part = 0; part < RowSum<Isa>::kParts; ++part) {
        sum[r].add(part, Isa::load(terms + part * Isa::kLanes));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out[r] = sum[r].total();
}

// The sum of f(value) over a row.
template <class Isa, class T, class F>
inline float sum_over(const T* x, int64_t n, F f) {
  const T* const rows[1] = {x};
  float sum[1];
  sums_over<Isa>(rows, n, [&](int, typename Isa::Float value) { return f(value); }, sum);
  return sum[0];
}

// (x - mean) / sqrt(variance + eps), or x / sqrt(mean square + eps), of R rows.
template <class Isa, int R, class T>
inline void center_rows(const NormArgs& a, const T* const (&x)[R], T* const (&y)[R]) {
  using Float = typename Isa::Float;
  const float count = static_cast<float>(a.n);
  float sums[R];
  Float mean[R], inverse[R];
  for (int r = 0; r < R; ++r) mean[r] = Isa::set(0.0f);
  if (a.norm == Norm::layer) {
    sums_over<Isa>(x, a.n, [](int, Float v) { return v; }, sums);
    for (int r = 0; r < R; ++r) mean[r] = Isa::set(sums[r] / count);
  }
  const auto square = [&](int r, Float v) {
    const Float distance = Isa::sub_float(v, mean[r]);
    return Isa::mul(distance, distance);
  };
  sums_over<Isa>(x, a.n, square, sums);
  for (int r = 0; r < R; ++r) inverse[r] = Isa::set(1.0f / sqrtf(sums[r] / count + a.eps));
  for (int r = 0; r < R; ++r) {
    each_register<Isa>(a.n, [&](int64_t i, auto part) {
      Float value = Isa::mul(Isa::sub_float(part.load(x[r] + i), mean[r]), inverse[r]);
      if (a.weight != nullptr) value = Isa::mul(value, part.load(a.weight + i));
      if (a.bias != nullptr) value = Isa::add_float(value, part.load(a.bias + i));
      part.store(y[r] + i, value);
    });
  }
}

template <class Isa, int R, class T>
inline void norm_rows(const NormArgs& a, const T*, int64_t first) {
  const T* x[R];
  T* y[R];
  for (int r = 0; r < R; ++r) {
    const int64_t row = first + r;
    x[r] = static_cast<const T*>(at_row(a.x, row, a.x_stride));
    y[r] = static_cast<T*>(at_row(a.y, row, a.y_stride));
    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(at_row(a.residual, row, a.residual_stride));
      each_register<Isa>(a.n, [&](int64_t i, auto part) {
        part.store(y[r] + i, Isa::add_float(part.load(residual + i), part.load(x[r] + i)));
      });
      x[r] = y[r];
    }
    if (a.norm == Norm::none && x[r] != y[r]) {
      memcpy(y[r], x[r], static_cast<size_t>(a.n) * sizeof(T));
    }
  }
  if (a.norm != Norm::none) center_rows<Isa, R, T>(a, x, y);
}

template <class Isa>
void norm(const NormArgs& a) {
  with_type(a.x, a.dtype, [&](const auto* x) {
    each_rows<Isa>(a.rows, [&](int64_t row, auto together) {
      norm_rows<Isa, decltype(together)::kRows>(a, x, row);
    });
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
  const auto exp_from_most = [&](Float v) { return exp_of<Isa>(Isa::sub_float(v, most)); };
  const Float sum = Isa::set(sum_over<Isa>(x, a.n, exp_from_most));
  each_register<Isa>(a.n, [&](int64_t i, auto part) {
    part.store(y + i, Isa::div(exp_from_most(part.load(x + i)), sum));
  });
}

template <class Isa>
void softmax(const SoftmaxArgs& a) {
  with_type(a.x, a.dtype, [&](const auto* x) { softmax_row<Isa>(a, x, typed_like(x, a.y)); });
}

}  // namespace
}  // namespace dynquant
