// From int32 sums to the output, and the kernel that adds up the parts of a product split over K.
#pragma once

#include <math.h>
#include <string.h>

#include "../cpu/convert.h"
#include "args.h"
#include "gpu.h"
#include "tile.h"

namespace dynquant {

// What one row and what one column contribute to the result.
struct RowTerms {
  int32_t zero_point;
  float scale;
};
struct ColumnTerms {
  int32_t sum;
  float scale;
  float bias;
};

// As header_fits, for sums that may be corrected already.
DYNQUANT_DEVICE bool header_fits(const FinishArgs& f) {
  return f.packed == nullptr || header_fits(f.packed, f.n, f.k);
}

DYNQUANT_DEVICE const int8_t* panel_of(const FinishArgs& f, int64_t panel) {
  return f.packed + kHeaderBytes + panel * panel_bytes(f.k);
}

DYNQUANT_DEVICE RowTerms terms_of_row(const FinishArgs& f, int64_t row) {
  RowTerms terms = {0, 0.0f};
  if (f.packed != nullptr) {
    terms.zero_point = f.zero_point.data[row * f.zero_point.step] + f.zero_point_shift;
  }
  if (f.out_dtype != Dtype::i32) terms.scale = f.scale.data[row * f.scale.step];
  return terms;
}

DYNQUANT_DEVICE ColumnTerms terms_of_column(const FinishArgs& f, int64_t column) {
  // No bias is a bias of -0, the one value whose sum with any y is y.
  ColumnTerms terms = {0, 0.0f, -0.0f};
  if (f.packed != nullptr) {
    const int8_t* panel = panel_of(f, column / kPanelColumns);
    terms.sum = reinterpret_cast<const int32_t*>(panel)[column % kPanelColumns];
  }
  if (f.out_dtype == Dtype::i32) return terms;
  terms.scale = f.weight_scale[f.per_channel ? column : 0];
  if (f.bias != nullptr) terms.bias = f.bias[column];
  return terms;
}

// Differences and products of 32 bits that wrap: what they stand for fits, not each step.
DYNQUANT_DEVICE int32_t corrected(int32_t sum, int32_t zero_point, int32_t column_sum) {
  const uint32_t shift = static_cast<uint32_t>(zero_point) * static_cast<uint32_t>(column_sum);
  return static_cast<int32_t>(static_cast<uint32_t>(sum) - shift);
}

constexpr int32_t kNoSum = -2147483647 - 1;  // no product of a valid weight sums up to that

template <class Gpu>
DYNQUANT_DEVICE void finish(int32_t sum, const RowTerms& row, const ColumnTerms& column, bool fits,
                            int32_t* out) {
  *out = fits ? corrected(sum, row.zero_point, column.sum) : kNoSum;
}
template <class Gpu, class Out>
DYNQUANT_DEVICE void finish(int32_t sum, const RowTerms& row, const ColumnTerms& column, bool fits,
                            Out* out) {
  const int32_t acc = corrected(sum, row.zero_point, column.sum);
  const float y = Gpu::mul(Gpu::mul(Gpu::to_float(acc), row.scale), column.scale);
  Gpu::narrow(fits ? Gpu::add(y, column.bias) : NAN, out);
}

// Calls f with a typed pointer to the output.
template <class F>
DYNQUANT_DEVICE void with_out(const FinishArgs& args, const F& f) {
  switch (args.out_dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(args.out));
    case Dtype::bf16:
      return f(static_cast<Bfloat16*>(args.out));
    case Dtype::f16:
      return f(static_cast<Half*>(args.out));
    case Dtype::i8:
      return;  // no product gives it
    case Dtype::i32:
      return f(static_cast<int32_t*>(args.out));
  }
}

// Eight results as 16-byte stores, where they may be stored so.
template <class Gpu, class Out>
DYNQUANT_DEVICE void store_run(const Out (&run)[kRunColumns], Out* out, int64_t count) {
  constexpr int kBytes = static_cast<int>(sizeof(run));
  if (count >= kRunColumns && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    Bytes16 bytes[kBytes / 16];
    memcpy(bytes, run, sizeof bytes);
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      Gpu::store16(reinterpret_cast<uint8_t*>(out) + 16 * i, bytes[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunColumns; ++i) {
    if (i < count) out[i] = run[i];
  }
}

// Adds up the parts of each sum and finishes it; one thread a column.
struct SumKernel {
  using Args = SumArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;

  static Grid grid(int64_t m, int64_t n) {
    constexpr int64_t kMostRows = 32768;  // a grid's y has 16 bits
    return {ceil_div(n, kThreads), static_cast<int>(m < kMostRows ? m : kMostRows)};
  }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    const int64_t column = Gpu::block_x() * kThreads + Gpu::thread();
    if (column >= a.finish.n) return;
    const bool fits = header_fits(a.finish);
    const ColumnTerms column_terms = terms_of_column(a.finish, column);
    for (int64_t row = Gpu::block_y(); row < a.finish.m; row += Gpu::grid_y()) {
      uint32_t sum = 0;
      for (int part = 0; part < a.parts; ++part) {
        sum += static_cast<uint32_t>(a.partial[part * a.part_stride + row * a.row_stride + column]);
      }
      const RowTerms row_terms = terms_of_row(a.finish, row);
      with_out(a.finish, [&](auto* out) {
        finish<Gpu>(static_cast<int32_t>(sum), row_terms, column_terms, fits,
                    out + row * a.finish.n + column);
      });
    }
  }
};

}  // namespace dynquant
