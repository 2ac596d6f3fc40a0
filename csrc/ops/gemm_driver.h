// The driver of every product: rows are staged block by block and multiplied by a packed weight.
#pragma once

#include <algorithm>
#include <optional>

#include "../cpu/layout.h"
#include "../cpu/qparams.h"
#include "activation.h"
#include "columns.h"
#include "packed.h"
#include "parallel.h"
#include "scratch.h"
#include "split.h"
#include "tensors.h"

namespace dynquant {

// Rows of activations: `stage(m, row, stride)` writes row m as the kernels read it, and gives its
// scale and the zero point of its unsigned form. Where `bytes()` is 2 it writes the high bytes at
// `row` and the low ones a stride further.
struct StagedRow {
  float scale;
  int32_t zero_point;
};

constexpr int64_t kBlockRows =
    192;  // staged rows, an even number that wait for one pass over panels
constexpr int64_t kBlockBytes = 1024 * 1024;  // but not more than this, where rows are long

// The product of all rows of `source` and a packed weight, split over threads.
template <class Source>
void multiply(const Kernels& kernels, const Source& source, int64_t m, const Packed& weight,
              const EpilogueArgs& epilogue, int64_t out_bytes) {
  const int64_t groups = groups_of(weight.k);
  // Rows at a power of two would share few cache sets: a line more between them spreads them.
  const int64_t stride = ceil_div(groups * kernels.group_bytes, 64) * 64 + 64;
  const int64_t bytes = source.bytes();
  const int64_t block = std::max<int64_t>(8, std::min(kBlockRows, kBlockBytes / stride)) / bytes;
  const Split split = choose_split(m, weight.n, weight.k, num_threads(), bytes);
  run_tasks(split.rows * split.columns, [&](int64_t task) {
    const Part part = part_of(split, task, m, weight.n);
    if (part.is_empty()) return;
    GemmArgs a = {};
    a.pairs = bytes == 2;
    a.panels = weight.panels;
    a.groups = groups;
    a.n_begin = part.n_begin;
    a.n_end = part.n_end;
    const int64_t rows = part.m_end - part.m_begin;
    const int64_t blocks = ceil_div(rows, block);
    uint8_t* staged = scratch(static_cast<size_t>(std::min(block, rows) * bytes * stride));
    float scale[kBlockRows];
    int32_t zero_point[kBlockRows];
    a.staged = staged;
    a.staged_stride = stride;
    a.zero_point = zero_point;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = part.m_begin + rows * b / blocks;
      const int64_t end = part.m_begin + rows * (b + 1) / blocks;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = (row - begin) * bytes;
        const StagedRow values = source.stage(row, staged + at * stride, stride);
        scale[row - begin] = values.scale;
        zero_point[at] = values.zero_point;
        if (bytes == 2) {
          zero_point[at] = values.zero_point / 256;
          zero_point[at + 1] = values.zero_point % 256;
        }
      }
      a.m = (end - begin) * bytes;
      a.epilogue = epilogue;
      a.epilogue.scale = scale;
      a.epilogue.out = static_cast<char*>(epilogue.out) + begin * epilogue.out_stride * out_bytes;
      kernels.gemm(a);
    }
  });
}

// Rows of floats that are quantized as they are staged.
struct FloatRows {
  const Kernels& kernels;
  Rows rows;
  Dtype dtype;
  ActivationScheme scheme;
  std::optional<QParams> whole;  // per_tensor

  int64_t bytes() const { return scheme.bits / 8; }

  StagedRow stage(int64_t m, uint8_t* staged, int64_t stride) const {
    const char* x = rows.data + m * rows.stride;
    const QParams p = whole.has_value() ? *whole : scheme.choose(kernels.range(x, dtype, rows.k));
    QuantizeArgs a = quantize_args(p, scheme.symmetric, true, scheme.bits);
    a.x = x;
    a.dtype = dtype;
    a.k = rows.k;
    a.q = staged;
    a.low = scheme.bits == 16 ? staged + stride : nullptr;
    kernels.quantize_staged(a);
    return {p.scale, p.zero_point + a.shift};
  }
};

}  // namespace dynquant
