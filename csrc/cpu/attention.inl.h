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

// R rows at once: in one alone, every step waits for the one before it.
//
// What lies behind a row is filled up with -Inf, which counts for nothing: exp(-Inf) is 0.
template <class Isa, int R>
inline void score_rows(const ScoresArgs& a, int64_t first) {
  using Float = typename Isa::Float;
  const int64_t filled = ceil_div(a.n, kPartials) * kPartials;
  const Float scale = Isa::set(a.scale), least = Isa::set(-INFINITY);
  float* rows[R];
  Float most[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    rows[r] = a.scores + (first + r) * a.stride;
    most[r] = least;
  }
  float is_behind[Isa::kLanes];  // negative where a lane of the last register is
  for (int64_t i = 0; i < Isa::kLanes; ++i) {
    is_behind[i] = a.n - (a.n - 1) / Isa::kLanes * Isa::kLanes <= i ? -1.0f : 1.0f;
  }
  for (int64_t i = 0; i < filled; i += Isa::kLanes) {
    const bool is_last = i + Isa::kLanes > a.n;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Float s = least;
      if (i < a.n) {
        s = Isa::mul(Isa::load(rows[r] + i), scale);
        for (const float* added : a.added) {
          if (added != nullptr) s = Isa::add_float(s, Isa::load(added + i));
        }
        if (is_last) s = Isa::select(Isa::is_negative(Isa::load(is_behind)), least, s);
        most[r] = Isa::max(s, most[r]);
      }
      Isa::store(rows[r] + i, s);
    }
  }
  RowSum<Isa> sum[R], all[R];  // `all` is NaN where a value is: nothing else could make it so
  Float hi[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    most[r] = Isa::set(Isa::reduce_max(most[r]));
    hi[r] = Isa::set(0.0f);
  }
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
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Float p = exp_of<Isa>(Isa::sub_float(Isa::load(rows[r] + at), most[r]));
        sum[r].add(part, p);
        if (value_scale != nullptr) p = Isa::mul(p, Isa::load(value_scale + part * Isa::kLanes));
        hi[r] = Isa::max(p, hi[r]);
        all[r].add(part, p);
        Isa::store(rows[r] + at, p);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float total = all[r].total();
    a.sum[first + r] = sum[r].total();
    a.range[first + r] = {0.0f, Isa::reduce_max(hi[r]), total != total};
  }
}

template <class Isa>
void scores(const ScoresArgs& a) {
  each_rows<Isa>(a.rows, [&](int64_t row, auto count) { score_rows<Isa, count>(a, row); });
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
