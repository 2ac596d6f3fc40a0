// What attention needs beside products, written once over an `Isa` type.
#pragma once

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "layout.h"
#include "norm.inl.h"
#include "quantize.inl.h"
#include "registers.inl.h"
#include "rows.inl.h"

namespace dynquant {
namespace {

template <class Isa>
void rotary(const RotaryArgs& a) {
  using Float = typename Isa::Float;
  const int64_t half = a.n / 2;
  with_type(a.x, a.dtype, [&](const auto* x) {
    auto* y = typed_like(x, a.y);
    each_register<Isa>(half, [&](int64_t i, auto part) {
      const Float first = part.load(x + i), second = part.load(x + half + i);
      part.store(y + i, Isa::sub_float(Isa::mul(first, part.load(a.cos + i)),
                                       Isa::mul(second, part.load(a.sin + i))));
      part.store(y + half + i, Isa::add_float(Isa::mul(second, part.load(a.cos + half + i)),
                                              Isa::mul(first, part.load(a.sin + half + i))));
    });
  });
}

// Rows of scores that share what is added, of which there are Added. What lies behind a row is
// filled up with -Inf, which counts for nothing: exp(-Inf) is 0.
template <class Isa, int Added>
class ScoreRows {
 public:
  explicit inline ScoreRows(const ScoresArgs& a) : a_(a), whole_(a.n / kPartials * kPartials) {
    if (a.value_scale == nullptr) return;
    for (int64_t i = whole_; i < a.n; ++i) last_scales_[i - whole_] = a.value_scale[i];
    scales_have_nan_ = range_of<Isa>(a.value_scale, a.n).has_nan;
  }

  // `first` and those after it.
  template <class Together>
  inline void score(int64_t first, Together) const {
    using Many = typename Together::Isa;
    using Float = typename Many::Float;
    constexpr int kRows = Together::kRows;
    float* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = a_.scores + (first + r) * a_.stride;

    Float most = Many::set(-INFINITY);
    each_register_of<Together>(
        rows, [&](int, int64_t, const float*, Float s) { most = Many::max(s, most); });
    float values[kRows], sums[kRows];
    Together::reduce(most, &Isa::reduce_max, values);
    most = Together::of(values);

    RowSum<Many, RowSum<Isa>::kParts> sum;
    Float hi = Many::set(0.0f);
    each_register_of<Together>(rows, [&](int part, int64_t i, const float* scales, Float s) {
      Float p = exp_of<Many>(Many::sub_float(s, most));
      sum.add(part, p);
      if (scales != nullptr) p = Many::mul(p, Together::same(Isa::load(scales)));
      hi = Many::max(p, hi);
      Together::store(rows, i, p, WholeRegister<Isa>());
    });
    Together::reduce(sum.joined(), &Isa::reduce_add, sums);
    Together::reduce(hi, &Isa::reduce_max, values);
    for (int r = 0; r < kRows; ++r) {
      a_.sum[first + r] = sums[r];
      a_.range[first + r] = {0.0f, values[r], scales_have_nan_ || sums[r] != sums[r]};
    }
  }

 private:
  // f(part, i, scales, s): s are the scores of all rows from number i on, in part `part` of a sum,
  // and `scales` the scales of their values. Computing them twice takes less than storing them.
  template <class Together, class F>
  inline void each_register_of(float* const* rows, const F& f) const {
    using Many = typename Together::Isa;
    using Float = typename Many::Float;
    constexpr int kParts = RowSum<Isa>::kParts;
    const Float scale = Many::set(a_.scale), least = Many::set(-INFINITY);
    const auto scaled = [&](int64_t i) {
      Float s = Many::mul(Together::load(rows, i, WholeRegister<Isa>()), scale);
#pragma GCC unroll 2
      for (int j = 0; j < Added; ++j) {
        s = Many::add_float(s, Together::same(Isa::load(a_.added[j] + i)));
      }
      return s;
    };
    for (int64_t first = 0; first < whole_; first += kPartials) {
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        const int64_t i = first + part * Isa::kLanes;
        f(part, i, a_.value_scale == nullptr ? nullptr : a_.value_scale + i, scaled(i));
      }
    }
    if (whole_ == a_.n) return;
#pragma GCC unroll 16
    for (int part = 0; part < kParts; ++part) {
      const int64_t lane = part * Isa::kLanes;
      const int64_t left = std::clamp<int64_t>(a_.n - whole_ - lane, 0, Isa::kLanes);
      const auto is_behind = Together::same_mask(lanes_from<Isa>(left));
      f(part, whole_ + lane, a_.value_scale == nullptr ? nullptr : last_scales_ + lane,
        Many::select(is_behind, least, scaled(whole_ + lane)));
    }
  }

  const ScoresArgs& a_;
  const int64_t whole_;                // scores in groups that are filled
  float last_scales_[kPartials] = {};  // a scale behind the row might be NaN
  bool scales_have_nan_ = false;
};

template <class Isa, int Added>
inline void scores_with(const ScoresArgs& a) {
  const ScoreRows<Isa, Added> scores(a);
  each_rows<Isa, 8>(a.rows, [&](int64_t row, auto together) { scores.score(row, together); });
}

template <class Isa>
void scores(const ScoresArgs& a) {
  ScoresArgs b = a;
  if (b.added[0] == nullptr) std::swap(b.added[0], b.added[1]);
  if (b.added[0] == nullptr) return scores_with<Isa, 0>(b);
  if (b.added[1] == nullptr) return scores_with<Isa, 1>(b);
  scores_with<Isa, 2>(b);
}

template <class Isa>
void divide(const DivideArgs& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* x = a.x + row * a.x_stride;
    const typename Isa::Float by = Isa::set(a.by[row]);
    with_output(at_row(a.y, row, a.y_stride), a.dtype, 0, [&](auto* y) {
      each_register<Isa>(
          a.n, [&](int64_t i, auto part) { part.store(y + i, Isa::div(part.load(x + i), by)); });
    });
  }
}

// Four rows become the four bytes of their columns.
template <class Isa>
void pack_transposed(const PackTransposedArgs& a) {
  for (int64_t p = 0; p < panels_of(a.k); ++p) {
    const int64_t first = p * kPanelColumns;
    const int64_t columns = a.k - first < kPanelColumns ? a.k - first : kPanelColumns;
    int8_t* panel = a.panels + p * panel_bytes(a.n);
    memset(panel, 0, static_cast<size_t>(kPanelColumns * kGroup));
    for (int64_t g = 0; g < groups_of(a.n); ++g) {
      const int64_t rows = a.n - g * kGroup < kGroup ? a.n - g * kGroup : kGroup;
      uint8_t bytes[kGroup][kPanelColumns] = {};
      for (int64_t r = 0; r < rows; ++r) {
        memcpy(bytes[r], a.rows + (g * kGroup + r) * a.stride + first,
               static_cast<size_t>(columns));
      }
      uint32_t words[kPanelColumns];
      for (int64_t c = 0; c < kPanelColumns; ++c) {
        words[c] = uint32_t{bytes[0][c]} | uint32_t{bytes[1][c]} << 8 |
                   uint32_t{bytes[2][c]} << 16 | uint32_t{bytes[3][c]} << 24;
      }
      memcpy(panel + (g + 1) * kPanelColumns * kGroup, words, sizeof words);
    }
  }
}

}  // namespace
}  // namespace dynquant
