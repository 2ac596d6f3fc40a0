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

// One register of columns of one row. Every step is rounded on its own: files are compiled without
// contraction.
template <class Isa, class Out>
inline void finish_float(typename Isa::Float acc, float scale, const float* weight_scale,
                         const float* bias, Out* out) {
  typename Isa::Float y = Isa::mul(acc, Isa::set(scale));
  y = Isa::mul(y, Isa::load(weight_scale));
  Isa::store(out, Isa::add_float(y, Isa::load(bias)));
}

template <class Isa, class Out>
inline void finish(typename Isa::Int acc, float scale, const float* weight_scale, const float* bias,
                   Out* out) {
  if constexpr (kIsInt32<Out>) {
    Isa::store_int(out, acc);
  } else {
    finish_float<Isa>(Isa::to_float(acc), scale, weight_scale, bias, out);
  }
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

// The one epilogue of every product: V registers of a row's sums, which were in registers or in
// memory, become the outputs of its columns. An activation is no part of it: applied to a panel's
// columns while they are in the L1 cache it was, on AVX512-VNNI, as fast to 3% slower than applied
// to a whole row by what reads that next, and brings it there in any case.
template <class Isa, int V, class Out>
inline void finish_row(const typename Isa::Int (&acc)[V], const TileOut<Out>& to, int64_t row) {
  const typename Isa::Int zero_point = Isa::set_int(to.zero_point[row]);
  const float scale = to.scale == nullptr ? 0.0f : to.scale[row];
  Out* out = to.out + row * to.out_stride;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int c = v * Isa::kLanes;
    const typename Isa::Int sums = Isa::load_int(to.column_sums + c);
    finish<Isa>(Isa::sub(acc[v], Isa::mul_int(zero_point, sums)), scale, to.weight_scale + c,
                to.bias + c, out + c);
  }
}

// The same of the staged rows `row` and `row + 1`, which are a pair; `row` is even.
template <class Isa, int V, class Out>
inline void finish_pair(const typename Isa::Int (&high)[V], const typename Isa::Int (&low)[V],
                        const TileOut<Out>& to, int64_t row) {
  const typename Isa::Int high_zero = Isa::set_int(to.zero_point[row]);
  const typename Isa::Int low_zero = Isa::set_int(to.zero_point[row + 1]);
  Out* out = to.out + row / 2 * to.out_stride;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int c = v * Isa::kLanes;
    const typename Isa::Int sums = Isa::load_int(to.column_sums + c);
    const typename Isa::Float acc = joined<Isa>(Isa::sub(high[v], Isa::mul_int(high_zero, sums)),
                                                Isa::sub(low[v], Isa::mul_int(low_zero, sums)));
    finish_float<Isa>(acc, to.scale[row / 2], to.weight_scale + c, to.bias + c, out + c);
  }
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

template <class Isa, class Out>
inline void rescale_rows(const RescaleArgs& a, Out*) {
  for (int64_t n0 = 0; n0 < a.n; n0 += kPanelColumns) {
    const int64_t columns = a.n - n0 < kPanelColumns ? a.n - n0 : kPanelColumns;
    const PanelColumns panel(a.epilogue, n0, columns);
    for (int64_t m = 0; m < a.m; ++m) {
      const int32_t* acc = a.acc + m * a.acc_stride + n0;
      Out* out = static_cast<Out*>(a.epilogue.out) + m * a.epilogue.out_stride + n0;
      int64_t c = 0;
      for (; c + Isa::kLanes <= columns; c += Isa::kLanes) {
        finish<Isa>(Isa::load_int(acc + c), a.epilogue.scale[m], panel.weight_scale + c,
                    panel.bias + c, out + c);
      }
      if (c < columns) {
        const size_t left = static_cast<size_t>(columns - c);
        int32_t in[Isa::kLanes] = {};
        Out result[Isa::kLanes];
        memcpy(in, acc + c, left * sizeof(int32_t));
        finish<Isa>(Isa::load_int(in), a.epilogue.scale[m], panel.weight_scale + c, panel.bias + c,
                    result);
        memcpy(out + c, result, left * sizeof(Out));
      }
    }
  }
}

template <class Isa>
void rescale(const RescaleArgs& a) {
  with_out_type(a.epilogue.out_dtype, [&](auto* out) { rescale_rows<Isa>(a, out); });
}

}  // namespace
}  // namespace dynquant
