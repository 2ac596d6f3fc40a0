// The product on a matrix unit whose registers are tiles, written once over an `Isa` type for the
// epilogue and a `Tiles` type for the unit's instructions.
//
// A tile is 16 rows of 64 bytes. A block is two tiles of rows by two of columns: four tiles of sums
// that stay where they are over the whole of K, two of activations and two of weights, so that each
// tile that is loaded serves two products. A panel of the packed weight is read as it is: 16 groups
// of its four k are the 16 rows of a tile.
//
// The sums of a block leave the unit through memory. Their epilogue is done a row at a time between
// the products of the next block, where the vector units have nothing else to do: that makes the
// whole 1.1 to 1.6 times as fast as an epilogue after each block.
//
// What a `Tiles` type has, where T, A, B, C are numbers of tiles below 8:
//   configure(rows)           rows[t] of each tile t, all of 64 bytes a row; sets the tiles to zero
//   release()                 gives the unit back
//   zero<T>() load<T>(p, stride) store<T>(p)    store: rows of 64 bytes without gaps
//   dot<C, A, B>()            C += unsigned bytes of A times signed ones of B, four k at a time
#pragma once

#include "epilogue.inl.h"
#include "kernels.h"
#include "layout.h"
#include "quantize.inl.h"

namespace dynquant {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 16;
constexpr int kTileGroups = 16;
constexpr int kTileBytes = kTileRows * static_cast<int>(kTileLine);
constexpr int kGroupStep = static_cast<int>(kPanelColumns * kGroup);  // bytes of a panel's group
constexpr int kBlockColumns = 2 * kTileColumns;
constexpr int kBlockRowsOfTiles = 2 * kTileRows;
constexpr int64_t kWindowBytes = 1024 * 1024;  // panels that all rows meet before the next ones do

// Rows of at most two tiles that are multiplied together.
inline int first_tile_rows(int64_t rows) {
  return static_cast<int>(rows < kTileRows ? rows : kTileRows);
}

// A finished block of sums that waits for its epilogue, and how much of that is done.
template <class Isa, class Out>
struct Pending {
  static constexpr int kVectors = kBlockColumns / Isa::kLanes;

  const int32_t* sums = nullptr;  // tile after tile: rows 0 to 15, left and right, then 16 to 31
  TileOut<Out> to = {};
  int64_t columns = 0;
  int next = 0;
  int rows = 0;

  inline void finish_rows(int count) {
    for (int i = 0; i < count && next < rows; ++i) finish_next();
  }

 private:
  inline void finish_next() {
    const TileOut<Out> row = to.at(next, 0);
    if (columns >= kBlockColumns) {
      finish_to(row);
    } else {
      Out result[kBlockColumns];  // the output may end before the block does
      TileOut<Out> beside = row;
      beside.out = result;
      finish_to(beside);
      memcpy(row.out, result, static_cast<size_t>(columns) * sizeof(Out));
    }
    next += to.pairs ? 2 : 1;
  }

  inline void finish_to(const TileOut<Out>& where) const {
    if constexpr (!kIsInt32<Out>) {
      if (where.pairs) return finish_staged<true>(where);
    }
    finish_staged<false>(where);
  }

  template <bool Pairs>
  inline void finish_staged(const TileOut<Out>& where) const {
    constexpr int kTileSums = kTileRows * kTileColumns, kStaged = Pairs ? 2 : 1;
    typename Isa::Int acc[kStaged][kVectors];
#pragma GCC unroll 2
    for (int r = 0; r < kStaged; ++r) {
      const int row = next + r;
      const int32_t* left = sums + row / kTileRows * 2 * kTileSums + row % kTileRows * kTileColumns;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const int c = v * Isa::kLanes;
        acc[r][v] = Isa::load_int(left + c / kTileColumns * kTileSums + c % kTileColumns);
      }
    }
    finish<Isa, Pairs>(acc, where);
  }
};

// The numbers of a block's tiles.
constexpr int kSums = 0, kRowTile = 4, kColumnTile = 6;

// 64 k of a block of one or two tiles of rows, with `between` after each product.
template <class Tiles, int RowTiles, class F>
inline void multiply_tiles(const uint8_t* staged, int64_t row_tile_step, const int8_t* weights,
                           const F& between) {
  constexpr int kStep = kTileColumns * static_cast<int>(kGroup);
  Tiles::template load<kRowTile>(staged, kTileLine);
  Tiles::template load<kColumnTile>(weights, kGroupStep);
  Tiles::template dot<kSums, kRowTile, kColumnTile>();
  between();
  Tiles::template load<kColumnTile + 1>(weights + kStep, kGroupStep);
  Tiles::template dot<kSums + 1, kRowTile, kColumnTile + 1>();
  between();
  if constexpr (RowTiles == 2) {
    Tiles::template load<kRowTile + 1>(staged + row_tile_step, kTileLine);
    Tiles::template dot<kSums + 2, kRowTile + 1, kColumnTile>();
    between();
    Tiles::template dot<kSums + 3, kRowTile + 1, kColumnTile + 1>();
    between();
  }
}

// What the last groups of a panel are copied to where they fill no tile. What lies beyond them is
// multiplied by staged zeros.
struct PanelTail {
  alignas(64) int8_t groups[kTileGroups * kGroupStep] = {};

  inline void copy(const int8_t* from, int64_t count) {
    memcpy(groups, from, static_cast<size_t>(count * kGroupStep));
  }
};

template <class Isa, class Tiles, class Out>
class TileGemm {
 public:
  explicit inline TileGemm(const GemmArgs& a)
      : a_(a),
        whole_(a.groups / kTileGroups),
        rest_(a.groups % kTileGroups),
        row_tile_step_(kTileRows * a.staged_stride),
        unit_(a.unit == nullptr ? own_ : *a.unit) {}

  inline void run() {
    const int64_t panel_stride = kGroupStep * (1 + a_.groups);
    const int64_t panels = kWindowBytes / panel_stride;
    const int64_t window = (panels < 1 ? 1 : panels) * kPanelColumns;
    const int64_t even = a_.m / kBlockRowsOfTiles * kBlockRowsOfTiles;
    for (int64_t n0 = a_.n_begin; n0 < a_.n_end; n0 += window) {
      const int64_t n1 = a_.n_end - n0 < window ? a_.n_end : n0 + window;
      if (even > 0) sweep<2>(0, even, kBlockRowsOfTiles, n0, n1);
      // The remainder has a configuration of its own: a product takes as long as it has rows.
      const int64_t left = a_.m - even;
      if (left > kTileRows) sweep<2>(even, a_.m, left, n0, n1);
      if (left > 0 && left <= kTileRows) sweep<1>(even, a_.m, left, n0, n1);
    }
    pending_.finish_rows(kBlockRowsOfTiles);
    if (own_.configured != 0) Tiles::release();
  }

 private:
  // Rows [m0, m1) in steps of `rows`, times the columns [n0, n1).
  template <int RowTiles>
  inline void sweep(int64_t m0, int64_t m1, int64_t rows, int64_t n0, int64_t n1) {
    configure(rows);
    const int64_t panel_stride = kGroupStep * (1 + a_.groups);
    for (int64_t n = n0; n < n1; n += kPanelColumns) {
      const int8_t* panel = a_.panels + n / kPanelColumns * panel_stride;
      const int64_t columns = a_.n_end - n < kPanelColumns ? a_.n_end - n : kPanelColumns;
      const int8_t* weights = panel + kGroupStep;
      if (rest_ > 0) tail_.copy(weights + whole_ * kTileGroups * kGroupStep, rest_);
      // The block before this panel's first one still needs the values of its own panel.
      turn_ ^= 1;
      values_[turn_].set(a_.epilogue, n, columns);
      const TileOut<Out> to = {a_.epilogue.scale,
                               a_.zero_point,
                               reinterpret_cast<const int32_t*>(panel),
                               values_[turn_].weight_scale,
                               values_[turn_].bias,
                               static_cast<Out*>(a_.epilogue.out) + n,
                               a_.epilogue.out_stride,
                               a_.pairs};
      for (int64_t c = 0; c < columns; c += kBlockColumns) {
        for (int64_t m = m0; m < m1; m += rows) {
          block<RowTiles>(m, weights + c * kGroup, tail_.groups + c * kGroup);
          pending_.to = to.at(m, c);
          pending_.columns = columns - c;
          pending_.rows = static_cast<int>(rows);
          pending_.next = 0;
        }
      }
    }
  }

  inline void configure(int64_t rows) {
    const bool is_own = unit_.release == &Tiles::release;
    if (is_own && rows == unit_.configured) return;
    if (!is_own && unit_.release != nullptr) unit_.release();  // of another set, in use before
    unit_ = {rows, &Tiles::release};
    const int first = first_tile_rows(rows), second = static_cast<int>(rows) - first;
    const int tile_rows[8] = {first, first,  second,      second,
                              first, second, kTileGroups, kTileGroups};
    Tiles::configure(tile_rows);
  }

  // The products of one block, with the epilogue of the one before between them.
  template <int RowTiles>
  inline void block(int64_t m, const int8_t* weights, const int8_t* tail) {
    const int64_t steps = whole_ + (rest_ > 0 ? 1 : 0);
    const int64_t slots = steps * RowTiles * 2;
    const int each =
        slots == 0 ? 0 : static_cast<int>(ceil_div(pending_.rows - pending_.next, slots));
    const auto between = [&] { pending_.finish_rows(each); };
    Tiles::template zero<kSums>();
    Tiles::template zero<kSums + 1>();
    if constexpr (RowTiles == 2) {
      Tiles::template zero<kSums + 2>();
      Tiles::template zero<kSums + 3>();
    }
    const uint8_t* staged = a_.staged + m * a_.staged_stride;
    for (int64_t step = 0; step < whole_; ++step) {
      multiply_tiles<Tiles, RowTiles>(staged, row_tile_step_, weights, between);
      staged += kTileBytes;
      weights += kTileGroups * kGroupStep;
    }
    if (rest_ > 0) multiply_tiles<Tiles, RowTiles>(staged, row_tile_step_, tail, between);
    pending_.finish_rows(kBlockRowsOfTiles);
    store<RowTiles>();
  }

  template <int RowTiles>
  inline void store() {
    constexpr int kTileSums = kTileRows * kTileColumns;
    int32_t* to = scratch_;
    Tiles::template store<kSums>(to);
    Tiles::template store<kSums + 1>(to + kTileSums);
    if constexpr (RowTiles == 2) {
      Tiles::template store<kSums + 2>(to + 2 * kTileSums);
      Tiles::template store<kSums + 3>(to + 3 * kTileSums);
    }
    pending_.sums = to;
  }

  const GemmArgs& a_;
  const int64_t whole_, rest_, row_tile_step_;
  UnitState own_ = {};  // where the caller keeps none
  UnitState& unit_;     // rows of the blocks that the tiles are configured for
  int turn_ = 0;
  Pending<Isa, Out> pending_;
  PanelColumns values_[2];
  PanelTail tail_;
  alignas(64) int32_t scratch_[kBlockRowsOfTiles * kBlockColumns];
};

template <class Isa, class Tiles, class Out>
inline void gemm_tiles_to(const GemmArgs& a, Out*) {
  TileGemm<Isa, Tiles, Out>(a).run();
}

template <class Isa, class Tiles>
void gemm_tiles(const GemmArgs& a) {
  with_out_type(a.epilogue.out_dtype, [&](auto* out) { gemm_tiles_to<Isa, Tiles>(a, out); });
}

// f(i, count, at) for each line of the tiles that k values of a row fill: the values [i, i +
// count), and where in the row's tiles the line begins.
template <class F>
inline void each_line(int64_t k, F f) {
  for (int64_t i = 0; i < k; i += kTileLine) {
    f(i, k - i < kTileLine ? k - i : kTileLine, i / kTileLine * kTileBytes);
  }
}

inline void fill_line(uint8_t* line, int64_t count) {
  memset(line + count, 0, static_cast<size_t>(kTileLine - count));
}

template <class Isa>
void quantize_tiles(const QuantizeArgs& a) {
  const ToIntegers<Isa, Multiply> to_integers(a);
  with_type(a.x, a.dtype, [&](const auto* x) {
    with_byte_rows(a, [&](const auto& q) {
      each_line(a.k, [&](int64_t i, int64_t count, int64_t at) {
        const auto line = q.from(at);
        quantize_run<Isa>(to_integers, x + i, count, line);
        for (uint8_t* bytes : line.row) fill_line(bytes, count);
      });
    });
  });
}

inline void stage_tiles(const uint8_t* q, int64_t k, uint8_t flip, uint8_t* staged) {
  each_line(k, [&](int64_t i, int64_t count, int64_t at) {
    uint8_t* line = staged + at;
    for (int64_t j = 0; j < count; ++j) line[j] = static_cast<uint8_t>(q[i + j] ^ flip);
    fill_line(line, count);
  });
}

// The products of a whole block, `steps` times over, without touching memory. Returns the
// multiply-adds done.
template <class Tiles>
int64_t peak_tiles(int64_t steps) {
  const int rows[8] = {16, 16, 16, 16, 16, 16, 16, 16};
  Tiles::configure(rows);
  for (int64_t s = 0; s < steps; ++s) {
    Tiles::template dot<kSums, kRowTile, kColumnTile>();
    Tiles::template dot<kSums + 1, kRowTile, kColumnTile + 1>();
    Tiles::template dot<kSums + 2, kRowTile + 1, kColumnTile>();
    Tiles::template dot<kSums + 3, kRowTile + 1, kColumnTile + 1>();
  }
  Tiles::release();
  return steps * 4 * kTileRows * kTileColumns * kTileLine;
}

template <class Isa, class Tiles>
constexpr Product tile_product(const Costs& costs) {
  Product p = {};
  p.row_multiple = kTileRows;
  p.layout.group_bytes = kGroup;
  p.layout.tile_rows = kTileRows;
  p.costs = costs;
  p.quantize_staged = &quantize_tiles<Isa>;
  p.stage = &stage_tiles;
  p.gemm = &gemm_tiles<Isa, Tiles>;
  return p;
}

}  // namespace
}  // namespace dynquant
