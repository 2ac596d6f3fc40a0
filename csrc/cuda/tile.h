// Where everything lies in a tile of the tensor-core product: shared memory, fragments, schedule.
//
// A block of threads makes a tile of kM rows by kN columns; each of its warps a part of kM / warps
// rows by kN / warps columns. It walks over K in steps of 64 bytes, of which several wait in shared
// memory. One step there is
//
//     activations  kM rows of 64 bytes, in chunks of 16 that are permuted within their row
//     weights      for each panel of 64 columns 16 groups of 4 k: 64 words, one for each column
//
// mma.m16n8k32 multiplies 16 rows by 8 columns over 32 k. Lane `4 r + t` of a warp holds
//
//     activations  words t and t + 4 (of 32 k) of the rows r and r + 8
//     weights      the groups t and t + 4 of column r
//     sums         columns 2 t and 2 t + 1 of the rows r and r + 8
//
// Which column is the r-th is free, and chosen so that four products together span 32 columns,
// product j having the columns 4 r + j: a lane then reads its weights of all four in 16 bytes, and
// its sums of a row are the eight neighbouring columns 8 t .. 8 t + 7, which it stores at once.
#pragma once

#include "../cpu/layout.h"

namespace dynquant {

constexpr int kStepK = 64;    // bytes of K in a step
constexpr int kChunk16 = 16;  // bytes of a copy
constexpr int kStepChunks = kStepK / kChunk16;
constexpr int kStepGroups = kStepK / kGroup;
constexpr int kGroupChunks = static_cast<int>(kPanelColumns * kGroup) / kChunk16;
constexpr int kPanelWidth = static_cast<int>(kPanelColumns);
// Eight words more than a group has: the four groups that a quarter of a warp reads lie in
// different banks.
constexpr int kGroupPitch = 4 * (kPanelWidth + 8);
constexpr int kPanelPitch = kStepGroups * kGroupPitch;
constexpr int kProductK = 32;     // k of one mma
constexpr int kProductRows = 16;  // its rows
constexpr int kSpanColumns = 32;  // columns of four products
constexpr int kSpanProducts = 4;
constexpr int kRunColumns = 8;  // neighbouring columns of a lane in a span

template <int M, int N, int RowWarps, int ColumnWarps, int Stages>
struct Tile {
  static constexpr int kM = M;
  static constexpr int kN = N;
  static constexpr int kColumnWarps = ColumnWarps;
  static constexpr int kWarpM = M / RowWarps;
  static constexpr int kWarpN = N / ColumnWarps;
  static constexpr int kProducts = kWarpM / kProductRows;  // of a warp, above each other
  static constexpr int kSpans = kWarpN / kSpanColumns;     // beside each other
  static constexpr int kPanels = N / kPanelWidth;
  static constexpr int kThreads = 32 * RowWarps * ColumnWarps;
  static constexpr int kActivationBytes = M * kStepK;
  static constexpr int kStageBytes = kActivationBytes + kPanels * kPanelPitch;
  static constexpr int kActivationCopies = M * kStepChunks / kThreads;  // of a thread in a step
  static constexpr int kWeightCopies = kPanels * kStepGroups * kGroupChunks / kThreads;
  static constexpr int kAsyncStages = Stages;

  static_assert(kWarpM % kProductRows == 0 && kWarpN % kSpanColumns == 0 && N % kPanelWidth == 0,
                "warps and panels must divide the tile");
  static_assert(M * kStepChunks % kThreads == 0 &&
                    kPanels * kStepGroups * kGroupChunks % kThreads == 0,
                "threads must divide the copies");
};

// Stages in shared memory: where copies are synchronous, a second one is all that helps.
constexpr int stages_of(int async_stages, bool async_copies) {
  return async_copies ? async_stages : 2;
}

// Byte of a step's activations where chunk `chunk` of row `row` lies. The chunks of eight rows that
// a fragment takes lie in different banks.
constexpr int activation_offset(int row, int chunk) {
  return row * kStepK + (chunk ^ ((row >> 1) & 3)) * kChunk16;
}

// Byte of a step's weights where the four k of a group of one of the tile's columns lie.
constexpr int weight_offset(int column, int group) {
  return column / kPanelWidth * kPanelPitch + group * kGroupPitch + column % kPanelWidth * 4;
}

// The row and the chunk whose address lane `lane` gives to ldmatrix, so that registers 0..3 are
// (rows 0..7, k 0..15), (rows 8..15, the same k), (rows 0..7, k 16..31), (rows 8..15, k 16..31).
constexpr int fragment_row(int lane) { return lane % 8 + lane / 8 % 2 * 8; }
constexpr int fragment_chunk(int lane) { return lane / 16; }

// The column within a span, and the group within 32 k, where a lane's 16 bytes of weights start;
// the second half of its weights lies four groups further.
constexpr int weight_column(int lane) { return lane / 4 * 4; }
constexpr int weight_group(int lane) { return lane % 4; }

// Where sum `i` of product `j` of a span lies.
constexpr int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
constexpr int sum_column(int lane, int j, int i) { return lane % 4 * kRunColumns + i % 2 * 4 + j; }

// The order of tiles. Blocks that run at the same time shall share what they read in L2: columns
// move on after eight tiles of rows.
struct TileAt {
  int64_t row;
  int64_t column;
};
constexpr int64_t kRasterRows = 8;
constexpr TileAt tile_at(int64_t index, int64_t row_tiles, int64_t column_tiles) {
  const int64_t band = index / (kRasterRows * column_tiles);
  const int64_t first = band * kRasterRows;
  const int64_t rows = row_tiles - first < kRasterRows ? row_tiles - first : kRasterRows;
  const int64_t within = index - first * column_tiles;
  return {first + within % rows, within / rows};
}

// Part `part` of `count` items in `parts` parts as even as can be.
struct Part {
  int64_t begin;
  int64_t end;
};
constexpr Part even_part(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

}  // namespace dynquant
