// Where staged rows lie, by the layout that their product asks for.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "layout.h"

namespace dynquant {

// The bytes that each row takes, wherever its tile puts them.
constexpr int64_t staged_stride(const StagedLayout& layout, int64_t groups) {
  const int64_t bytes = ceil_div(groups * layout.group_bytes, kTileLine) * kTileLine;
  // Rows at a power of two would share few cache sets: a line more between them spreads them, and
  // has room for the excess. Tiles follow one another as they are read.
  return layout.tile_rows == 1 ? bytes + kTileLine : bytes;
}

constexpr int64_t staged_bytes(const StagedLayout& layout, int64_t stride, int64_t rows) {
  return ceil_div(rows, layout.tile_rows) * layout.tile_rows * stride;
}

// Where a row begins.
constexpr int64_t staged_offset(const StagedLayout& layout, int64_t stride, int64_t row) {
  if (layout.tile_rows == 1) return row * stride;  // spares a division for each row
  return row / layout.tile_rows * layout.tile_rows * stride + row % layout.tile_rows * kTileLine;
}

constexpr int64_t kBlockBytes = 1024 * 1024;  // of staged rows that wait for a pass over panels

// f(begin, end) for blocks of the rows [0, rows), of about the same size, which begin at multiples
// of `multiple`.
template <class F>
void for_each_block(const Product& product, int64_t rows, int64_t row_bytes, int64_t multiple,
                    const F& f) {
  const int64_t most = std::min(product.block_rows, kBlockBytes / std::max<int64_t>(row_bytes, 1));
  const int64_t block = std::max({int64_t{8}, 2 * multiple, most});
  const int64_t units = ceil_div(rows, multiple), blocks = ceil_div(rows, block);
  for (int64_t b = 0; b < blocks; ++b) {
    f(units * b / blocks * multiple, std::min(rows, units * (b + 1) / blocks * multiple));
  }
}

}  // namespace dynquant
