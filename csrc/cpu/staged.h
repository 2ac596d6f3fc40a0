// Where staged rows lie, by the layout that their product asks for.
#pragma once

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

}  // namespace dynquant
