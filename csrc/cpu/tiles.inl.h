// The product on a matrix unit whose registers are tiles, written once over an `Isa` type for the
// epilogue and a `Tiles` type for the unit's instructions.
//
// A tile is 16 rows of 64 bytes. A block is two tiles of rows by two of columns, or one by four:
// four tiles of sums that stay where they are over the whole of K. A panel of the packed weight is
// read as it is: 16 groups of its four k are the 16 rows of a tile.
//
// The rows of a block stay in the L1 cache while all weights of a window pass by, which are loaded
// with a hint that says so: 1.1 to 1.3 times as fast as without. The other way round, with the
// weights of a block in the L1 cache, would be up to 1.2 times as fast where K is below 700 and
// everything is in the L2 cache, but else up to 1.6 times as slow: outputs are then written to as
// many places at once as there are rows.
//
// What a `Tiles` type has, where T, A, B, C are numbers of tiles below 8:
//   configure(rows)           rows[t] of each tile t, all of 64 bytes a row; sets the tiles to zero
//   release()                 gives the unit back
//   zero<T>() load<T>(p, stride) store<T>(p, stride)
//   load_passing<T>(p, stride)                 load, of what the L1 cache should not keep
//   dot<C, A, B>()            C += unsigned bytes of A times signed ones of B, four k at a time
#pragma once

#include <utility>

#include "epilogue.inl.h"
#include "flatten.h"
#include "kernels.h"
#include "layout.h"
#include "pending_rows.inl.h"
#include "quantize.inl.h"

namespace dynquant {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 16;
constexpr int kTileGroups = 16;
constexpr int kTileBytes = kTileRows * static_cast<int>(kTileLine);
constexpr int kGroupStep = static_cast<int>(kPanelColumns * kGroup);  // bytes of a panel's group
constexpr int64_t kMostBlockRows = 2 * kTileRows;
constexpr int64_t kWindowBytes = 640 * 1024;  // panels that all rows meet before the next ones do

// A block of one or two tiles of rows, and the numbers of its tiles.
template <int RowTiles>
struct Block {
  static constexpr int kColumnTiles = 4 / RowTiles;
  static constexpr int kColumns = kColumnTiles * kTileColumns;
  static constexpr int kRowTile = 4, kColumnTile = kRowTile + RowTiles;
  static constexpr int kColumnTilesAtOnce = 8 - kColumnTile;

  static constexpr int sums(int row_tile, int column_tile) {
    return row_tile * kColumnTiles + column_tile;
  }
  static constexpr int column(int column_tile) {
    return kColumnTile + column_tile % kColumnTilesAtOnce;
  }

  template <class Tiles>
  static inline void configure(int rows) {
    const int first = rows < kTileRows ? rows : kTileRows;
    int tile_rows[8];
    for (int t = 0; t < 8; ++t) tile_rows[t] = kTileGroups;
    for (int r = 0; r < RowTiles; ++r) {
      const int of_tile = r == 0 ? first : rows - first;
      tile_rows[kRowTile + r] = of_tile;
      for (int c = 0; c < kColumnTiles; ++c) tile_rows[sums(r, c)] = of_tile;
    }
    Tiles::configure(tile_rows);
  }

  // The sums of the block before go to rows of kColumns of them, and those of the next begin at
  // zero.
  template <class Tiles, int Sums>
  static inline void next_sums(int32_t* to) {
    constexpr int64_t kStride = kColumns * static_cast<int64_t>(sizeof(int32_t));
    constexpr int kRow = Sums / kColumnTiles * kTileRows;
    constexpr int kColumn = Sums % kColumnTiles * kTileColumns;
    Tiles::template store<Sums>(to + kRow * kColumns + kColumn, kStride);
    Tiles::template zero<Sums>();
  }
  template <class Tiles>
  static inline void all_next_sums(int32_t* to) {
    next_sums<Tiles, 0>(to);
    next_sums<Tiles, 1>(to);
    next_sums<Tiles, 2>(to);
    next_sums<Tiles, 3>(to);
  }

  // 64 k, with before(the number of its sums, as a type) and after() each product.
  template <class Tiles, class Before, class After>
  static inline void multiply(const uint8_t* staged, int64_t row_tile_step, const int8_t* weights,
                              const Before& before, const After& after) {
    constexpr std::make_integer_sequence<int, kColumnTiles> kAll;
    Tiles::template load<kRowTile>(staged, kTileLine);
    multiply_row<Tiles, 0>(weights, before, after, kAll);
    if constexpr (RowTiles == 2) {
      Tiles::template load<kRowTile + 1>(staged + row_tile_step, kTileLine);
      multiply_row<Tiles, 1>(weights, before, after, kAll);
    }
  }

 private:
  template <class Tiles, int R, int... C, class Before, class After>
  static inline void multiply_row(const int8_t* weights, const Before& before, const After& after,
                                  std::integer_sequence<int, C...>) {
    (multiply_tile<Tiles, R, C>(weights, before, after), ...);
  }
  template <class Tiles, int R, int C, class Before, class After>
  static inline void multiply_tile(const int8_t* weights, const Before& before,
                                   const After& after) {
    if constexpr (R == 0) {
      Tiles::template load_passing<column(C)>(weights + C * kTileColumns * kGroup, kGroupStep);
    }
    before(std::integral_constant<int, sums(R, C)>());
    Tiles::template dot<sums(R, C), kRowTile + R, column(C)>();
    after();
  }
};

// What the last `count` groups of a panel are copied to where they fill no tile. What lies beyond
// them is multiplied by staged zeros.
struct PanelTail {
  alignas(64) int8_t groups[kTileGroups * kGroupStep];

  explicit inline PanelTail(int64_t count) {
    if (count > 0) memset(groups, 0, sizeof(groups));
  }
  inline void copy(const int8_t* from, int64_t count) {
    memcpy(groups, from, static_cast<size_t>(count * kGroupStep));
  }
};

// Blocks of the same number of rows, one after the other.
template <class Isa, class Tiles, int RowTiles, bool Pairs, class Out>
class Sweep {
 public:
  explicit inline Sweep(const GemmArgs& a)
      : a_(a),
        whole_(a.groups / kTileGroups),
        rest_(a.groups % kTileGroups),
        row_tile_step_(kTileRows * a.staged_stride),
        tail_(rest_) {}

  // Rows [m0, m1) in steps of `rows`, times the columns [n0, n1). The tiles are configured for it.
  inline void run(int64_t m0, int64_t m1, int64_t rows, int64_t n0, int64_t n1) {
    const int64_t steps = whole_ + (rest_ > 0 ? 1 : 0), products = 4 * (steps - 1);
    each_ = products <= 0 ? 0 : ceil_div(ceil_div(rows, Rows::kTogether), products);
    for (int64_t m = m0; m < m1; m += rows) {
      for (int64_t n = n0; n < n1; n += kPanelColumns) panel(m, rows, n);
    }
    Shape::template all_next_sums<Tiles>(sums_);
    Rows(pending_).finish_all();
  }

 private:
  using Shape = Block<RowTiles>;
  using Rows = PendingRows<Isa, Pairs, Shape::kColumns, Out>;

  inline void panel(int64_t m, int64_t rows, int64_t n) {
    const int8_t* panel = a_.panels + n / kPanelColumns * kGroupStep * (1 + a_.groups);
    const int64_t columns = a_.n_end - n < kPanelColumns ? a_.n_end - n : kPanelColumns;
    const int8_t* weights = panel + kGroupStep;
    if (rest_ > 0) tail_.copy(weights + whole_ * kTileGroups * kGroupStep, rest_);
    // The block before this panel's first one still needs the values of its own panel.
    turn_ ^= 1;
    values_[turn_].set(a_.epilogue, n, columns);
    to_[turn_] = panel_out<Out>(a_, n, panel, values_[turn_]);
    for (int64_t c = 0; c < columns; c += Shape::kColumns) {
      block(m, weights + c * kGroup, tail_.groups + c * kGroup);
      pending_ = {sums_, &to_[turn_], m, c, columns - c, static_cast<int>(rows)};
    }
  }

  // The products of one block. The sums of the one before leave their tiles between its first
  // products, and become outputs between the others.
  DYNQUANT_FLATTEN inline void block(int64_t m, const int8_t* weights, const int8_t* tail) {
    const uint8_t* staged = a_.staged + m * a_.staged_stride;
    const int64_t row_tile_step = row_tile_step_;
    Rows rows(pending_);
    const int64_t each = rows.whole() ? each_ : 0;
    const auto next_sums = [to = sums_](auto of) {
      Shape::template next_sums<Tiles, decltype(of)::value>(to);
    };
    const auto finish_some = [&] {
      for (int64_t i = 0; i < each; ++i) rows.finish_next();
    };
    const auto nothing = [](auto...) {};
    if (whole_ > 0) {
      Shape::template multiply<Tiles>(staged, row_tile_step, weights, next_sums, nothing);
      const uint8_t* const end = staged + whole_ * kTileBytes;
      for (staged += kTileBytes; staged < end; staged += kTileBytes) {
        weights += kTileGroups * kGroupStep;
        Shape::template multiply<Tiles>(staged, row_tile_step, weights, nothing, finish_some);
      }
      if (rest_ > 0) {
        Shape::template multiply<Tiles>(staged, row_tile_step, tail, nothing, finish_some);
      }
    } else if (rest_ > 0) {
      Shape::template multiply<Tiles>(staged, row_tile_step, tail, next_sums, nothing);
    } else {
      Shape::template all_next_sums<Tiles>(sums_);  // no k
    }
    if (rows.left() > 0) finish_last(rows.left());
  }

  // From the pending block once more: were `rows` of block() passed, they would be in memory there.
  [[gnu::noinline]] void finish_last(int left) {
    Rows rows(pending_);
    rows.leave(left);
    rows.finish_all();
  }

  const GemmArgs& a_;
  const int64_t whole_, rest_, row_tile_step_;
  int64_t each_ = 0;  // rows, or pairs of them, to finish after each product but the first ones
  int turn_ = 0;
  Pending<Out, Shape::kColumns> pending_;
  PanelColumns values_[2];
  TileOut<Out> to_[2];
  PanelTail tail_;
  alignas(64) int32_t sums_[RowTiles * kTileRows * Shape::kColumns];
};

template <class Isa, class Tiles, bool Pairs, class Out>
class TileGemm {
 public:
  explicit inline TileGemm(const GemmArgs& a) : a_(a), unit_(a.unit == nullptr ? own_ : *a.unit) {}

  inline void run() {
    const int64_t panels = kWindowBytes / (kGroupStep * (1 + a_.groups));
    const int64_t window = (panels < 1 ? 1 : panels) * kPanelColumns;
    const int64_t even = a_.m / kMostBlockRows * kMostBlockRows, left = a_.m - even;
    for (int64_t n0 = a_.n_begin; n0 < a_.n_end; n0 += window) {
      const int64_t n1 = a_.n_end - n0 < window ? a_.n_end : n0 + window;
      if (even > 0) sweep<2>(0, kMostBlockRows, n0, n1);
      // The remainder has a configuration of its own: a product takes as long as it has rows.
      if (left > kTileRows) sweep<2>(even, left, n0, n1);
      if (left > 0 && left <= kTileRows) sweep<1>(even, left, n0, n1);
    }
    if (own_.configured != 0) Tiles::release();
  }

 private:
  // All whole blocks of `rows` rows from m on.
  template <int RowTiles>
  inline void sweep(int64_t m, int64_t rows, int64_t n0, int64_t n1) {
    configure<RowTiles>(rows);
    const int64_t end = m + (a_.m - m) / rows * rows;
    Sweep<Isa, Tiles, RowTiles, Pairs, Out>(a_).run(m, end, rows, n0, n1);
  }

  template <int RowTiles>
  inline void configure(int64_t rows) {
    const bool is_own = unit_.release == &Tiles::release;
    if (is_own && rows == unit_.configured) return;
    if (!is_own && unit_.release != nullptr) unit_.release();  // of another set, in use before
    unit_ = {rows, &Tiles::release};
    Block<RowTiles>::template configure<Tiles>(static_cast<int>(rows));
  }

  const GemmArgs& a_;
  UnitState own_ = {};  // where the caller keeps none
  UnitState& unit_;     // rows of the blocks that the tiles are configured for
};

template <class Isa, class Tiles, class Out>
inline void gemm_tiles_to(const GemmArgs& a, Out*) {
  if constexpr (!kIsInt32<Out>) {
    if (a.pairs) return TileGemm<Isa, Tiles, true, Out>(a).run();
  }
  TileGemm<Isa, Tiles, false, Out>(a).run();
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

template <class T>
inline void fetch(const T* values, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(values);
  for (int64_t b = 0; b < count * static_cast<int64_t>(sizeof(T)); b += kLine) {
    __builtin_prefetch(bytes + b);
  }
}

inline void fill_line(uint8_t* line, int64_t count) {
  memset(line + count, 0, static_cast<size_t>(kTileLine - count));
}

template <class Isa>
void quantize_tiles(const QuantizeArgs& a) {
  const ToIntegers<Isa, Multiply> to_integers(a);
  with_type(a.x, a.dtype, [&](const auto* x) {
    const auto* ahead = static_cast<decltype(x)>(a.ahead);
    with_byte_rows(a, [&](const auto& q) {
      each_line(a.k, [&](int64_t i, int64_t count, int64_t at) {
        // These values come from the L1 cache, since their range was just taken.
        if (ahead != nullptr) fetch(ahead + i, count);
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
  using Shape = Block<2>;
  constexpr int kRow = Shape::kRowTile, kColumn = Shape::kColumnTile;
  Shape::configure<Tiles>(kMostBlockRows);
  for (int64_t s = 0; s < steps; ++s) {
    Tiles::template dot<Shape::sums(0, 0), kRow, kColumn>();
    Tiles::template dot<Shape::sums(0, 1), kRow, kColumn + 1>();
    Tiles::template dot<Shape::sums(1, 0), kRow + 1, kColumn>();
    Tiles::template dot<Shape::sums(1, 1), kRow + 1, kColumn + 1>();
  }
  Tiles::release();
  return steps * 4 * kTileRows * kTileColumns * kTileLine;
}

template <class Isa, class Tiles>
constexpr Product tile_product(const Costs& costs) {
  Product p = {};
  p.row_multiple = kMostBlockRows;
  p.block_rows = 512;
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
