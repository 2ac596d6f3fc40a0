// From int32 sums to the output, written once over an `Isa` type.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

template <class T>
constexpr bool kIsInt32 = false;
template <>
constexpr bool kIsInt32<int32_t> = true;

// The values of one register of columns. Every step is rounded on its own: files are compiled
// without contraction.
template <class Isa>
struct ColumnScaling {
  typename Isa::Float weight_scale, bias;

  inline ColumnScaling() = default;
  inline ColumnScaling(const float* weight_scale_, const float* bias_)
      : weight_scale(Isa::load(weight_scale_)), bias(Isa::load(bias_)) {}
  inline typename Isa::Float operator()(typename Isa::Float acc, float scale) const {
    const typename Isa::Float y = Isa::mul(acc, Isa::set(scale));
    return Isa::add_float(Isa::mul(y, weight_scale), bias);
  }
};

// A row's sums, corrected for its zero point.
template <class Isa>
inline typename Isa::Int corrected_sums(typename Isa::Int acc, int32_t zero_point,
                                        typename Isa::Int column_sums) {
  return Isa::sub(acc, Isa::mul_int(Isa::set_int(zero_point - Isa::kOffset), column_sums));
}

// The sums of the high and the low bytes of activations in 16 bits as one float. The product is
// exact, so there is one rounding for each sum and one for joining them.
template <class Isa>
inline typename Isa::Float joined(typename Isa::Int high, typename Isa::Int low) {
  return Isa::add_float(Isa::mul(Isa::set(256.0f), Isa::to_float(high)), Isa::to_float(low));
}

// Where the results of some rows and columns go, and the values that they need.
template <class Out>
struct TileOut {
  const float* scale;
  const int32_t* zero_point;
  const int32_t* column_sums;
  const float* weight_scale;
  const float* bias;
  Out* out;
  int64_t out_stride;
  bool pairs;  // two staged rows give one of the output

  // From that staged row and column on. Computed each time: changing a copy in place would wait
  // for the stores of the tile before.
  inline TileOut at(int64_t row, int64_t column) const {
    const int64_t out_row = pairs ? row / 2 : row;
    return {scale == nullptr ? nullptr : scale + out_row,
            zero_point + row,
            column_sums + column,
            weight_scale + column,
            bias + column,
            out + out_row * out_stride + column,
            out_stride,
            pairs};
  }
};

// The one epilogue of every product: the sums of R staged rows by V registers, which were in
// registers or in memory, become outputs, of which two rows have one where they are pairs. An
// activation is no part of it: applied to a panel's columns while they are in the L1 cache it was,
// on AVX512-VNNI, as fast to 3% slower than applied to a whole row by what reads that next, and
// brings it there in any case.
template <class Isa, bool Pairs, int R, int V, class Out>
inline void finish(const typename Isa::Int (&acc)[R][V], const TileOut<Out>& at) {
  const TileOut<Out> to = at;  // as far as the compiler knows, a store may change what `at` holds
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int c = v * Isa::kLanes;
    const typename Isa::Int sums = Isa::load_int(to.column_sums + c);
    const auto corrected = [&](int r) {
      return corrected_sums<Isa>(acc[r][v], to.zero_point[r], sums);
    };
    Out* out = to.out + c;
    if constexpr (kIsInt32<Out>) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, out += to.out_stride) Isa::store_int(out, corrected(r));
    } else {
      const ColumnScaling<Isa> scaled(to.weight_scale + c, to.bias + c);
      constexpr int kStep = Pairs ? 2 : 1;
#pragma GCC unroll 16
      for (int r = 0; r < R; r += kStep, out += to.out_stride) {
        const typename Isa::Float sum =
            Pairs ? joined<Isa>(corrected(r), corrected(r + 1)) : Isa::to_float(corrected(r));
        Isa::store(out, scaled(sum, to.scale[r / kStep]));
      }
    }
  }
}

// The same, where the output tells whether its rows are pairs.
template <class Isa, int R, int V, class Out>
inline void finish_rows(const typename Isa::Int (&acc)[R][V], const TileOut<Out>& at) {
  if constexpr (R % 2 == 0 && !kIsInt32<Out>) {
    if (at.pairs) return finish<Isa, true>(acc, at);
  }
  finish<Isa, false>(acc, at);
}

// Calls f with a typed null pointer that stands for the output's type.
template <class F>
inline void with_out_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<Bfloat16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::i32:
      return f(static_cast<int32_t*>(nullptr));
    case Dtype::i8:
      return;  // no product gives it
  }
}

// No bias is a bias of -0, the one value whose sum with any y is y.
struct NoBias {
  constexpr NoBias() {
    for (float& value : values) value = -0.0f;
  }
  float values[kPanelColumns] = {};
};
constexpr NoBias kNoBias;

// The column values of one panel where a whole panel may be read: a single scale is repeated, what
// lies beyond the last column is filled up.
class PanelColumns {
 public:
  inline PanelColumns() = default;
  inline PanelColumns(const EpilogueArgs& e, int64_t n0, int64_t columns) { set(e, n0, columns); }
  PanelColumns(const PanelColumns&) = delete;

  inline void set(const EpilogueArgs& e, int64_t n0, int64_t columns) {
    weight_scale = scale_buffer_;
    bias = bias_buffer_;
    if (e.out_dtype == Dtype::i32) return;
    if (!e.per_channel) {
      for (float& value : scale_buffer_) value = e.weight_scale[0];
    } else if (columns < kPanelColumns) {
      fill(scale_buffer_, e.weight_scale + n0, columns);
    } else {
      weight_scale = e.weight_scale + n0;
    }
    if (e.bias == nullptr) {
      bias = kNoBias.values;
    } else if (columns < kPanelColumns) {
      fill(bias_buffer_, e.bias + n0, columns);
    } else {
      bias = e.bias + n0;
    }
  }

  const float* weight_scale = scale_buffer_;
  const float* bias = bias_buffer_;

 private:
  static inline void fill(float* buffer, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
    for (int64_t i = count; i < kPanelColumns; ++i) buffer[i] = -0.0f;
  }

  float scale_buffer_[kPanelColumns];
  float bias_buffer_[kPanelColumns];
};

template <class Out>
inline TileOut<Out> panel_out(const GemmArgs& a, int64_t n0, const int8_t* panel,
                              const PanelColumns& values) {
  return {a.epilogue.scale,      a.zero_point, reinterpret_cast<const int32_t*>(panel),
          values.weight_scale,   values.bias,  static_cast<Out*>(a.epilogue.out) + n0,
          a.epilogue.out_stride, a.pairs};
}

template <class Isa, class Out>
inline void rescale_rows(const RescaleArgs& a, Out*) {
  for (int64_t n0 = 0; n0 < a.n; n0 += kPanelColumns) {
    const int64_t columns = a.n - n0 < kPanelColumns ? a.n - n0 : kPanelColumns;
    const PanelColumns panel(a.epilogue, n0, columns);
    for (int64_t m = 0; m < a.m; ++m) {
      const int32_t* acc = a.acc + m * a.acc_stride + n0;
      Out* out = static_cast<Out*>(a.epilogue.out) + m * a.epilogue.out_stride + n0;
      const auto scale = [&](int64_t c, const int32_t* from, Out* to) {
        const ColumnScaling<Isa> scaled(panel.weight_scale + c, panel.bias + c);
        Isa::store(to, scaled(Isa::to_float(Isa::load_int(from)), a.epilogue.scale[m]));
      };
      int64_t c = 0;
      for (; c + Isa::kLanes <= columns; c += Isa::kLanes) scale(c, acc + c, out + c);
      if (c < columns) {
        const size_t left = static_cast<size_t>(columns - c);
        int32_t in[Isa::kLanes] = {};
        Out result[Isa::kLanes];
        memcpy(in, acc + c, left * sizeof(int32_t));
        scale(c, in, result);
        memcpy(out + c, result, left * sizeof(Out));
      }
    }
  }
}

template <class Isa>
inline void rescale_rows(const RescaleArgs&, int32_t*) {}  // sums are not rescaled to sums

template <class Isa>
void rescale(const RescaleArgs& a) {
  with_out_type(a.epilogue.out_dtype, [&](auto* out) { rescale_rows<Isa>(a, out); });
}

}  // namespace
}  // namespace dynquant
