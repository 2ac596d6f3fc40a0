// The driver of every product: rows are staged block by block and multiplied by a packed weight.
#pragma once

#include <algorithm>
#include <optional>

#include "../cpu/layout.h"
#include "../cpu/qparams.h"
#include "../cpu/staged.h"
#include "activation.h"
#include "columns.h"
#include "packed.h"
#include "parallel.h"
#include "scratch.h"
#include "split.h"
#include "tensors.h"
#include "unit.h"
#include "weight_traffic.h"

namespace dynquant {

// Rows of activations: `stage(product, m, row, low)` writes row m as that product reads it, and
// gives its scale and the zero point of its unsigned form. Where `bytes()` is 2, the high bytes go
// to `row` and the low ones to `low`: two staged rows.
struct StagedRow {
  float scale;
  int32_t zero_point;
};

// Staged rows for one product, `bytes` for each row of the source, with their scales and zero
// points, in the calling thread's memory. They may be staged and multiplied part by part, on any
// threads; all parts are of staged rows.
class StagedRows {
 public:
  StagedRows(const Product& product, int64_t k, int64_t rows, int64_t bytes_of_value,
             Purpose purpose)
      : product_(product),
        bytes_(bytes_of_value),
        halving_(bytes_of_value == 2 ? 1 : 0),
        groups_(groups_of(k)),
        stride_(staged_stride(product.layout, groups_)) {
    const int64_t bytes = staged_bytes(product.layout, stride_, rows);
    staged_ = scratch(static_cast<size_t>(bytes + rows * kBytesBeside), purpose);
    scale_ = reinterpret_cast<float*>(staged_ + bytes);
    zero_point_ = reinterpret_cast<int32_t*>(scale_ + rows);
  }

  // Plain bytes [rows, k], `stride` bytes apart, as they lie, where the product reads them so.
  StagedRows(const Product& product, int64_t k, uint8_t* rows, int64_t stride, float* scale,
             int32_t* zero_point)
      : product_(product),
        bytes_(1),
        halving_(0),
        groups_(groups_of(k)),
        stride_(stride),
        staged_(rows),
        scale_(scale),
        zero_point_(zero_point) {}
  static bool reads_plain(const Product& product) {
    return product.layout.tile_rows == 1 && product.layout.group_bytes == kGroup;
  }

  // Rows of the source from that of the staged row `first` on become the rows [begin, end).
  template <class Source>
  void stage(const Source& source, int64_t first, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row += bytes_) {
      const int64_t m = (first + row - begin) >> halving_;
      uint8_t* low = bytes_ == 2 ? at(row + 1) : nullptr;
      const StagedRow values = source.stage(product_, m, at(row), low);
      scale_[row >> halving_] = values.scale;
      if (bytes_ == 2) {
        zero_point_[row] = values.zero_point / 256;
        zero_point_[row + 1] = values.zero_point % 256;
      } else {
        zero_point_[row] = values.zero_point;
      }
    }
  }

  // Rows [begin, end) times the columns [n_begin, n_end). `begin` is the first row of a tile;
  // `epilogue.out` is where its results go. `is_far` tells whether the weight comes from memory,
  // `next` what the thread reads after it, or null.
  void multiply(int64_t begin, int64_t end, const Packed& weight, int64_t n_begin, int64_t n_end,
                const EpilogueArgs& epilogue, bool is_far, const int8_t* next = nullptr) const {
    GemmArgs a = {};
    a.staged = at(begin);
    a.pairs = bytes_ == 2;
    a.staged_stride = stride_;
    a.zero_point = zero_point_ + begin;
    a.m = end - begin;
    a.panels = weight.panels;
    a.groups = groups_;
    a.n_begin = n_begin;
    a.n_end = n_end;
    a.epilogue = epilogue;
    a.epilogue.scale = scale_ + (begin >> halving_);
    a.unit = &unit_of_thread();
    a.next = next;
    a.is_far = is_far;
    product_.gemm(a);
  }

 private:
  uint8_t* at(int64_t row) const { return staged_ + staged_offset(product_.layout, stride_, row); }

  static constexpr int64_t kBytesBeside = sizeof(float) + sizeof(int32_t);  // of a row

  const Product& product_;
  const int64_t bytes_;
  const int halving_;  // from staged rows to rows of the source: a shift, divisions are slow
  const int64_t groups_, stride_;
  uint8_t* staged_;
  float* scale_;
  int32_t* zero_point_;
};

constexpr int64_t kSharedBytes = 32 * 1024 * 1024;  // staged before the product, at most

// Up to so many rows, a weight that comes from memory takes longer to read than to multiply by.
constexpr int64_t kFewRows = 8;

// Whether a product of so many rows reads those panels from memory; asked once for each product.
inline bool reads_far(int64_t rows, const int8_t* panels, int64_t bytes) {
  return rows <= kFewRows && comes_from_memory(panels, bytes, num_threads());
}

// A packed weight [N, K], and where its product goes.
struct Target {
  const Packed& weight;
  EpilogueArgs epilogue;
};

// The products of all rows of `source` and `count` packed weights of one K, split over threads:
// rows are staged once for all of them.
template <class Source>
void multiply(const Kernels& kernels, const Source& source, int64_t m, const Target* targets,
              int64_t count, int64_t out_bytes) {
  // From here on rows are staged ones.
  const int64_t bytes = source.bytes(), rows = m * bytes, k = targets[0].weight.k;
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) columns += targets[i].weight.n;
  const Product& product = product_for(kernels, rows, columns, k);
  const int64_t multiple = std::max(product.row_multiple, bytes);
  const int64_t row_bytes = staged_stride(product.layout, groups_of(k));
  const int64_t threads = num_threads();
  const bool is_far = reads_far(rows, targets[0].weight.panels, columns * k);
  Split split = choose_split(rows, columns, k, threads, product.costs, multiple);
  if (is_far && led_team() != nullptr) split = in_small_parts(split, columns);
  std::optional<StagedRows> shared;
  if (split.stage_first && rows * row_bytes <= kSharedBytes) {
    shared.emplace(product, k, rows, bytes, Purpose::shared_rows);
    const int64_t units = ceil_div(rows, multiple), parts = std::min(units, threads);
    run_tasks(parts, [&](int64_t part) {
      const int64_t begin = units * part / parts * multiple;
      const int64_t end = std::min(rows, units * (part + 1) / parts * multiple);
      shared->stage(source, begin, begin, end);
    });
  }
  run_tasks(split.parts(), [&](int64_t task) {
    // Rows [begin, end), of which that number `first` is the first staged one.
    const auto multiply_all = [&](const StagedRows& staged, int64_t first, int64_t begin,
                                  int64_t end) {
      for (int64_t i = 0; i < count; ++i) {
        const Target& target = targets[i];
        const Part part = part_of(split, task, rows, target.weight.n);
        if (part.is_empty()) continue;
        EpilogueArgs to = target.epilogue;
        to.out = static_cast<char*>(to.out) + begin / bytes * to.out_stride * out_bytes;
        staged.multiply(begin - first, end - first, target.weight, part.n_begin, part.n_end, to,
                        is_far);
      }
    };
    const Part part = part_of(split, task, rows, columns);
    if (part.is_empty()) return;
    for_each_block(product, part.m_end - part.m_begin, row_bytes, multiple,
                   [&](int64_t b, int64_t e) {
                     const int64_t begin = part.m_begin + b, end = part.m_begin + e;
                     if (shared.has_value()) {
                       multiply_all(*shared, 0, begin, end);
                     } else {
                       const StagedRows own(product, k, end - begin, bytes, Purpose::staged_rows);
                       own.stage(source, begin, 0, end - begin);
                       multiply_all(own, begin, begin, end);
                     }
                   });
  });
}

// The same of one weight.
template <class Source>
void multiply(const Kernels& kernels, const Source& source, int64_t m, const Packed& weight,
              const EpilogueArgs& epilogue, int64_t out_bytes) {
  const Target target = {weight, epilogue};
  multiply(kernels, source, m, &target, 1, out_bytes);
}

// A row of floats, quantized by `p` as it is staged.
inline StagedRow stage_floats(const Product& product, const void* x, Dtype dtype, int64_t k,
                              const QParams& p, bool symmetric, int bits, uint8_t* staged,
                              uint8_t* low, const void* ahead = nullptr) {
  QuantizeArgs a = quantize_args(p, symmetric, true, bits);
  a.x = x;
  a.dtype = dtype;
  a.k = k;
  a.q = staged;
  a.low = low;
  a.ahead = ahead;
  product.quantize_staged(a);
  return {p.scale, p.zero_point + a.shift};
}

// Rows of floats that are quantized as they are staged.
struct FloatRows {
  const Kernels& kernels;
  Rows rows;
  Dtype dtype;
  ActivationScheme scheme;
  std::optional<QParams> whole;  // per_tensor

  int64_t bytes() const { return scheme.bits / 8; }

  StagedRow stage(const Product& product, int64_t m, uint8_t* staged, uint8_t* low) const {
    const char* x = rows.data + m * rows.stride;
    const QParams p = whole.has_value() ? *whole : scheme.choose(kernels.range(x, dtype, rows.k));
    return stage_floats(product, x, dtype, rows.k, p, scheme.symmetric, scheme.bits, staged, low,
                        m + 1 < rows.m ? x + rows.stride : nullptr);
  }
};

}  // namespace dynquant
