// What attention needs beside products, written once over an `Isa` type.
#pragma once

#include "kernels.h"
#include "layout.h"
#include "norm.inl.h"
#include "quantize.inl.h"
#include "registers.inl.h"

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

// What lies behind the row is filled up with -Inf, which counts for nothing: exp(-Inf) is 0.
template <class Isa>
ScoresResult scores(const ScoresArgs& a) {
  using Float = typename Isa::Float;
  const int64_t filled = ceil_div(a.n, kPartials) * kPartials;
  const Float scale = Isa::set(a.scale);
  Float most = Isa::set(-INFINITY);
  for (int64_t i = 0; i < a.n; i += Isa::kLanes) {
    Float s = Isa::mul(Isa::load(a.scores + i), scale);
    for (const float* added : a.added) {
      if (added != nullptr) s = Isa::add_float(s, Isa::load(added + i));
    }
    Isa::store(a.scores + i, s);
    if (i + Isa::kLanes > a.n) {
      for (int64_t j = a.n; j < i + Isa::kLanes; ++j) a.scores[j] = -INFINITY;
      s = Isa::load(a.scores + i);
    }
    most = Isa::max(s, most);
  }
  for (int64_t i = ceil_div(a.n, Isa::kLanes) * Isa::kLanes; i < filled; ++i) {
    a.scores[i] = -INFINITY;
  }
  most = Isa::set(Isa::reduce_max(most));
  RowSum<Isa> sum;
  Float hi = Isa::set(0.0f);
  RowSum<Isa> all;  // NaN where one of the values is: nothing else could make it so
  float last_scales[kPartials] = {};  // a scale behind the row might be NaN
  for (int64_t i = 0; i < filled; i += kPartials) {
    const float* value_scale = a.value_scale == nullptr ? nullptr : a.value_scale + i;
    if (value_scale != nullptr && i + kPartials > a.n) {
      memcpy(last_scales, value_scale, static_cast<size_t>(a.n - i) * sizeof(float));
      value_scale = last_scales;
    }
#pragma GCC unroll 16
    for (int part = 0; part < RowSum<Isa>::kParts; ++part) {
      const int64_t at = i + part * Isa::kLanes;
      Float p = exp_of<Isa>(Isa::sub_float(Isa::load(a.scores + at), most));
      sum.add(part, p);
      if (value_scale != nullptr) p = Isa::mul(p, Isa::load(value_scale + part * Isa::kLanes));
      hi = Isa::max(p, hi);
      all.add(part, p);
      Isa::store(a.scores + at, p);
    }
  }
  const float total = all.total();
  return {sum.total(), {0.0f, Isa::reduce_max(hi), total != total}};
}

template <class Isa>
void divide(const DivideArgs& a) {
  const typename Isa::Float by = Isa::set(a.by);
  with_output(a.y, a.dtype, 0, [&](auto* y) {
    each_register<Isa>(
        a.n, [&](int64_t i, auto part) { part.store(y + i, Isa::div(part.load(a.x + i), by)); });
  });
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
