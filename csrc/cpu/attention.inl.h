// What attention needs beside products, written once over an `Isa` type.
#pragma once

#include <float.h>

#include <utility>

#include "kernels.h"
#include "layout.h"
#include "norm.inl.h"
#include "quantize.inl.h"
#include "registers.inl.h"
#include "rows.inl.h"

namespace dynquant {
namespace {

template <class Isa, class T>
inline void turn_halves(const RotaryArgs& a, const T* x, T* y) {
  using Float = typename Isa::Float;
  const int64_t half = a.n / 2;
  each_register<Isa>(half, [&](int64_t i, auto part) {
    const Float first = part.load(x + i), second = part.load(x + half + i);
    part.store(y + i, Isa::sub_float(Isa::mul(first, part.load(a.cos + i)),
                                     Isa::mul(second, part.load(a.sin + i))));
    part.store(y + half + i, Isa::add_float(Isa::mul(second, part.load(a.cos + half + i)),
                                            Isa::mul(first, part.load(a.sin + half + i))));
  });
}

template <class Isa, class T>
inline void turn_neighbors(const RotaryArgs& a, const T* x, T* y) {
  using Float = typename Isa::Float;
  const auto turned = [&](int64_t i, Float own, Float neighbor, auto part) {
    return Isa::add_float(Isa::mul(own, part.load(a.cos + i)),
                          Isa::mul(neighbor, part.load(a.sin + i)));
  };
  if constexpr (Isa::kLanes == 1) {
    constexpr WholeRegister<Isa> kOne;
    for (int64_t i = 0; i < a.n; i += 2) {
      const Float first = kOne.load(x + i), second = kOne.load(x + i + 1);
      kOne.store(y + i, turned(i, first, second, kOne));
      kOne.store(y + i + 1, turned(i + 1, second, first, kOne));
    }
  } else {
    each_register<Isa>(a.n, [&](int64_t i, auto part) {
      const Float own = part.load(x + i);
      part.store(y + i, turned(i, own, Isa::swap_neighbors(own), part));
    });
  }
}

template <class Isa>
void rotary(const RotaryArgs& a) {
  with_type(a.x, a.dtype, [&](const auto* x) {
    auto* y = typed_like(x, a.y);
    if (a.interleaved) {
      turn_neighbors<Isa>(a, x, y);
    } else {
      turn_halves<Isa>(a, x, y);
    }
  });
}

// Rows of scores, to each of which Added rows are added. What lies behind a row is filled up with
// -Inf, which counts for nothing: exp(-Inf) is 0.
template <class Isa, int Added>
class ScoreRows {
 public:
  explicit inline ScoreRows(const ScoresArgs& a) : a_(a) {
    if (a.value_scale == nullptr) return;
    const int64_t last = a.n % kPartials;
    for (int64_t i = 0; i < last; ++i) last_scales_[i] = a.value_scale[a.n - last + i];
    scales_have_nan_ = range_of<Isa>(a.value_scale, a.n).has_nan;
  }

  // `first` and those after it.
  template <class Together>
  inline void score(int64_t first, Together) const {
    using Many = typename Together::Isa;
    using Float = typename Many::Float;
    constexpr int kRows = Together::kRows;
    float* rows[kRows];
    const float* added[2][kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = a_.scores + (first + r) * a_.stride;
      for (int j = 0; j < Added; ++j) added[j][r] = a_.added[j] + (first + r) * a_.added_stride[j];
    }
    const Float scale = Many::set(a_.scale), least = Many::set(-INFINITY);
    // Computing them twice takes less than storing them.
    const auto scaled = [&](int64_t i, auto part) {
      Float s = Many::mul(Together::load(rows, i, WholeRegister<Isa>()), scale);
#pragma GCC unroll 2
      for (int j = 0; j < Added; ++j) {
        s = Many::add_float(s, Together::load(added[j], i, WholeRegister<Isa>()));
      }
      return filled_up<Together>(s, least, part);
    };

    // Not -Inf, from which a row that is masked as a whole would be NaN away: it gives zeros, as
    // torch's scaled_dot_product_attention does.
    Float most = Many::set(-FLT_MAX);
    each_part<Isa>(a_.n,
                   [&](int, int64_t i, auto part) { most = Many::max(scaled(i, part), most); });
    float values[kRows], sums[kRows];
    if (a_.sink != nullptr) most = Many::max(most, Many::set(*a_.sink));
    Together::reduce(most, &Isa::reduce_max, values);
    most = Together::of(values);

    RowSum<Many, RowSum<Isa>::kParts> sum;
    Float hi = Many::set(0.0f);
    each_part<Isa>(a_.n, [&](int p, int64_t i, auto part) {
      Float probability = exp_of<Many>(Many::sub_float(scaled(i, part), most));
      sum.add(p, probability);
      if (a_.value_scale != nullptr) {
        const Float scales = Together::same(Isa::load(value_scales(p, i, part)));
        probability = Many::mul(probability, scales);
      }
      hi = Many::max(probability, hi);
      Together::store(rows, i, probability, WholeRegister<Isa>());
    });
    Together::reduce(sum.joined(), &Isa::reduce_add, sums);
    if (a_.sink != nullptr) {
      float own[kRows];
      const Float sink = Many::sub_float(Many::set(*a_.sink), most);
      Together::reduce(exp_of<Many>(sink), &Isa::reduce_max, own);
      for (int r = 0; r < kRows; ++r) sums[r] += own[r];
    }
    Together::reduce(hi, &Isa::reduce_max, values);
    for (int r = 0; r < kRows; ++r) {
      a_.sum[first + r] = sums[r] == 0.0f ? 1.0f : sums[r];
      a_.range[first + r] = {0.0f, values[r], scales_have_nan_ || sums[r] != sums[r]};
    }
  }

 private:
  inline const float* value_scales(int, int64_t i, WholeRegister<Isa>) const {
    return a_.value_scale + i;
  }
  inline const float* value_scales(int p, int64_t, PartOfRegister<Isa>) const {
    return last_scales_ + p * Isa::kLanes;
  }

  const ScoresArgs& a_;
  float last_scales_[kPartials] = {};  // of the last group: a scale behind it might be NaN
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
  if (b.added[0] == nullptr) {
    std::swap(b.added[0], b.added[1]);
    std::swap(b.added_stride[0], b.added_stride[1]);
  }
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

// As products of ones.
template <class Isa>
void sum_columns(int8_t* panels, int64_t n, int64_t k) {
  constexpr int64_t kStep = kPanelColumns * kGroup;
  uint8_t ones[kGroup], staged[Isa::kGroupBytes];
  memset(ones, Isa::kOffset + 1, sizeof ones);
  Isa::stage(ones, 1, staged);
  const typename Isa::Activation a = Isa::load_activation(staged);
  for (int64_t p = 0; p < panels_of(n); ++p) {
    int8_t* panel = panels + p * panel_bytes(k);
    for (int64_t c = 0; c < kStep; c += Isa::kLanes * kGroup) {
      typename Isa::Int sum = Isa::set_int(0);
      for (int64_t g = 1; g <= groups_of(k); ++g) {
        sum = Isa::dot(sum, a, Isa::load_weights(panel + g * kStep + c));
      }
      Isa::store_int(reinterpret_cast<int32_t*>(panel + c), sum);
    }
  }
}

}  // namespace
}  // namespace dynquant
