// The product of staged activations and a packed weight, written once over an `Isa` type.
//
// A tile is R rows by V registers of columns. Its sums stay in registers over the whole of K, so no
// int32 ever travels through memory: a weight register is loaded once for R rows, an activation is
// broadcast once for V registers. Rows are split evenly (32 rows are 6, 6, 5, 5, 5, 5), because a
// last tile of two rows would run at a third of the speed.
#pragma once

#include "epilogue.inl.h"
#include "excess.inl.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

// Registers that a tile of R rows by V registers of columns works with. The operand of which there
// are fewer registers stays in them, the other streams past.
template <class Isa>
constexpr int tile_registers(int rows, int vectors) {
  const int kept = !Isa::kKeepsWeights ? 0 : rows < vectors ? rows : vectors;
  return rows * vectors + kept + 1 + Isa::kTemporaries;
}

// Registers of columns for a tile of `rows`: as many as the registers and the panel allow, a power
// of two so that tiles fill a panel.
template <class Isa>
constexpr int tile_vectors(int rows) {
  int vectors = static_cast<int>(kPanelColumns) / Isa::kLanes;
  while (vectors > 1 && tile_registers<Isa>(rows, vectors) > Isa::kRegisters) vectors /= 2;
  return vectors;
}

// The next panel on its way to the L2 cache while this one is computed: two lines for each group of
// the first strips, which at few rows is a little more than the panel has. With one line, whose
// neighbour comes with it, models of few rows are up to a tenth slower. The processor's own
// prefetcher stops at each page, and models whose weights outgrow the L2 cache together wait for
// every one of them.
struct Ahead {
  const int8_t* at = nullptr;
  int64_t step = 0;  // bytes for each group; 0: nothing is fetched
};

constexpr int64_t kStaysInL2 = 1024 * 1024;  // weights of which nothing needs to be fetched ahead
constexpr int64_t kStaysInL1 = 32 * 1024;    // a panel of which every strip finds the start there
constexpr int64_t kLongTileMostRows = 32;
constexpr int64_t kLine = 64;
// Strips that fetch the next panel; the others find it there. A weight that outgrows the L2 cache
// comes from farther away, and more slowly than four strips would have it.
constexpr int64_t kFetchStrips = 4;
constexpr int64_t kFarFetchStrips = 16;
// This panel, on its way from the L2 to the L1 cache: a tile narrower than a panel reads a line
// here and there, which no prefetcher follows well. A single row, where the set has several panels
// for it, is 1.03 to 1.08 times as fast on an AMD Zen 3.
constexpr int64_t kNearGroups = 8;

template <class Isa, int R>
inline typename Isa::Weights weights_of(const int8_t* p) {
  const typename Isa::Weights w = Isa::load_weights(p);
  // Else the compiler may load them once for each row: loads would then be the limit.
  return R > 1 && Isa::kKeepsWeights ? Isa::keep(w) : w;
}

// Four k of the whole tile.
template <class Isa, int R, int V>
inline void multiply_group(const uint8_t* staged, int64_t staged_stride, const int8_t* weights,
                           typename Isa::Int (&acc)[R][V]) {
  constexpr int kBytes = Isa::kLanes * static_cast<int>(kGroup);
  if constexpr (R < V && Isa::kKeepsWeights) {
    typename Isa::Activation a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = Isa::load_activation(staged + r * staged_stride);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const typename Isa::Weights w = weights_of<Isa, R>(weights + v * kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = Isa::dot(acc[r][v], a[r], w);
    }
  } else {
    typename Isa::Weights w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) w[v] = weights_of<Isa, R>(weights + v * kBytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Isa::Activation a = Isa::load_activation(staged + r * staged_stride);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Isa::dot(acc[r][v], a, w[v]);
    }
  }
}

template <class Isa, int R, int V>
inline void clear(typename Isa::Int (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = Isa::set_int(0);
  }
}

// What sets whose staged bytes have an offset have too much; `end` is where the rows' groups end.
template <class Isa, int R, int V>
inline void take_excess(const uint8_t* end, int64_t staged_stride, typename Isa::Int (&acc)[R][V]) {
  if constexpr (Isa::kOffset != 0) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Isa::Int excess = Isa::set_int(excess_at(end + r * staged_stride));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Isa::sub(acc[r][v], excess);
    }
  }
}

// Where nothing is fetched ahead, its instructions would cost up to a tenth.
template <class Isa, int R, int V, bool Fetches, class Out>
__attribute__((noinline)) void tile(const uint8_t* staged, int64_t staged_stride,
                                    const int8_t* weights, int64_t groups, Ahead ahead,
                                    const TileOut<Out>& to) {
  constexpr int kBytes = V * Isa::kLanes * static_cast<int>(kGroup);
  constexpr int kStep = static_cast<int>(kPanelColumns * kGroup);
  typename Isa::Int acc[R][V];
  clear<Isa>(acc);

  // Two groups a turn: 1.01 to 1.03 times as fast on an Intel Cascade Lake.
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (kBytes < kStep || (R == 1 && Isa::kFarPanels > 1)) {
#pragma GCC unroll 16
      for (int c = 0; c < kBytes; c += kLine) {
        __builtin_prefetch(weights + kNearGroups * kStep + c);
      }
    }
    if constexpr (Fetches) {
      __builtin_prefetch(ahead.at, 0, 2);
      __builtin_prefetch(ahead.at + kLine, 0, 2);
      ahead.at += ahead.step;
    }
    multiply_group<Isa, R, V>(staged, staged_stride, weights, acc);
    staged += Isa::kGroupBytes;
    weights += kStep;
  }
  take_excess<Isa>(staged, staged_stride, acc);
  if constexpr (R % 2 == 0 && !kIsInt32<Out>) {
    if (to.pairs) return finish<Isa, true>(acc, to);
  }
  finish<Isa, false>(acc, to);
}

// The last columns of a weight, fewer than V registers: where they do not fill half or a quarter of
// these, whole registers are computed beside the output, which may end there, and copied.
template <class Isa, int R, int V, class Out>
inline void rest(const uint8_t* staged, int64_t staged_stride, const int8_t* weights,
                 int64_t groups, int64_t columns, const TileOut<Out>& to) {
  constexpr int kStep = V * Isa::kLanes;
  // A high tile of one register of columns has more row pointers than there are registers for.
  if constexpr (V > 1 && (V > 2 || R <= Isa::kTileRows)) {
    if (columns <= kStep / 2) {
      return rest<Isa, R, V / 2>(staged, staged_stride, weights, groups, columns, to);
    }
  }
  if (columns == kStep) {
    return tile<Isa, R, V, false>(staged, staged_stride, weights, groups, {}, to);
  }
  Out result[R * kStep];
  const TileOut<Out> beside = {to.scale, to.zero_point, to.column_sums, to.weight_scale,
                               to.bias,  result,        kStep,          to.pairs};
  tile<Isa, R, V, false>(staged, staged_stride, weights, groups, {}, beside);
  for (int r = 0; r < (to.pairs ? R / 2 : R); ++r) {
    // memcpy would become `rep movs`, which takes longer to start than a row takes to be copied.
    memmove(to.out + r * to.out_stride, result + r * kStep,
            static_cast<size_t>(columns) * sizeof(Out));
  }
}

// One strip of R rows through the columns of one panel, in steps of V registers. What is left over
// takes half as many where they suffice: a weight of few columns would compute mostly padding.
template <class Isa, int R, int V, bool Fetches, class Out>
inline void strip(const GemmArgs& a, int64_t m0, const int8_t* panel, int64_t columns,
                  const TileOut<Out>& to, Ahead& ahead) {
  constexpr int kStep = V * Isa::kLanes;
  const uint8_t* staged = a.staged + m0 * a.staged_stride;
  const int8_t* weights = panel + kPanelColumns * kGroup;
  int64_t c = 0;
  for (; columns - c >= kStep; c += kStep) {
    tile<Isa, R, V, Fetches>(staged, a.staged_stride, weights + c * kGroup, a.groups, ahead,
                             to.at(m0, c));
    if constexpr (Fetches) ahead.at += a.groups * ahead.step;
  }
  if (c < columns) {
    rest<Isa, R, V>(staged, a.staged_stride, weights + c * kGroup, a.groups, columns - c,
                    to.at(m0, c));
  }
}

inline bool outgrows(const GemmArgs& a, int64_t bytes) {
  return (a.n_end - a.n_begin) * a.groups * kGroup > bytes;
}

template <class Isa, int R, class Out>
inline void strip_of(int64_t rows, const GemmArgs& a, int64_t m0, const int8_t* panel,
                     int64_t columns, const TileOut<Out>& to, Ahead& ahead) {
  if (rows == R) {
    constexpr int kVectors = tile_vectors<Isa>(R);
    if constexpr (R > 1) {  // a single row is at its next panel too soon
      if (ahead.step > 0) return strip<Isa, R, kVectors, true>(a, m0, panel, columns, to, ahead);
    }
    return strip<Isa, R, kVectors, false>(a, m0, panel, columns, to, ahead);
  }
  if constexpr (R > 1) return strip_of<Isa, R - 1>(rows, a, m0, panel, columns, to, ahead);
}

template <class Out>
inline TileOut<Out> panel_out(const GemmArgs& a, int64_t n0, const int8_t* panel,
                              const PanelColumns& values) {
  return {a.epilogue.scale,      a.zero_point, reinterpret_cast<const int32_t*>(panel),
          values.weight_scale,   values.bias,  static_cast<Out*>(a.epilogue.out) + n0,
          a.epilogue.out_stride, a.pairs};
}

// The sums of R rows and the columns of one panel, in tiles.
template <class Isa, int R>
struct PanelSums {
  static constexpr int kVectors = tile_vectors<Isa>(R);
  static constexpr int kColumns = kVectors * Isa::kLanes;
  static constexpr int kTiles = static_cast<int>(kPanelColumns) / kColumns;
  typename Isa::Int acc[kTiles][R][kVectors];

  inline void clear() {
    for (auto& tile : acc) dynquant::clear<Isa>(tile);
  }

  // Takes in G groups, one tile after the other.
  template <int G>
  inline void multiply(const uint8_t* staged, int64_t staged_stride, const int8_t* weights) {
#pragma GCC unroll 16
    for (int t = 0; t < kTiles; ++t) {
      typename Isa::Int sums[R][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sums[r][v] = acc[t][r][v];
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        multiply_group<Isa, R, kVectors>(staged + g * Isa::kGroupBytes, staged_stride,
                                         weights + (g * kPanelColumns + t * kColumns) * kGroup,
                                         sums);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[t][r][v] = sums[r][v];
      }
    }
  }

  template <class Out>
  inline void store(const uint8_t* staged_end, int64_t staged_stride, const TileOut<Out>& to) {
    for (int t = 0; t < kTiles; ++t) {
      take_excess<Isa>(staged_end, staged_stride, acc[t]);
      finish<Isa, false>(acc[t], to.at(0, t * kColumns));
    }
  }
};

// A few rows and S whole panels side by side. Weights come from memory as S streams, which is
// faster than one stream with any fetching ahead: 1.3 to 1.5 times with four on an AMD Zen 3. They
// have to alternate as finely as this: 1 KB of each in turn is slower, 4 KB no better than one
// stream. From the caches it is slower than one, down to 0.8 times with three rows: the sums of a
// panel wait in the L1 cache for its turn.
template <class Isa, int R, int S, class Out>
__attribute__((noinline)) void panels_side_by_side(const GemmArgs& a, int64_t n0,
                                                   const int8_t* panel, int64_t panel_stride) {
  constexpr int kTurn = 2;
  constexpr int64_t kStep = kPanelColumns * kGroup;
  PanelSums<Isa, R> sums[S];
  for (int s = 0; s < S; ++s) sums[s].clear();
  const uint8_t* staged = a.staged;
  const int8_t* weights = panel + kStep;
  int64_t g = 0;
  for (; g + kTurn <= a.groups; g += kTurn) {
    for (int s = 0; s < S; ++s) {
      sums[s].template multiply<kTurn>(staged, a.staged_stride, weights + s * panel_stride);
    }
    staged += kTurn * Isa::kGroupBytes;
    weights += kTurn * kStep;
  }
  for (; g < a.groups; ++g) {
    for (int s = 0; s < S; ++s) {
      sums[s].template multiply<1>(staged, a.staged_stride, weights + s * panel_stride);
    }
    staged += Isa::kGroupBytes;
    weights += kStep;
  }
  for (int s = 0; s < S; ++s) {
    const int64_t n = n0 + s * kPanelColumns;
    const PanelColumns values(a.epilogue, n, kPanelColumns);
    sums[s].store(staged, a.staged_stride, panel_out<Out>(a, n, panel + s * panel_stride, values));
  }
}

// As many whole panels of R rows as there are for S at once, and for half as many, from n0 on.
// Gives the column behind them.
template <class Isa, int R, int S, class Out>
inline int64_t side_by_side(const GemmArgs& a, int64_t n0, int64_t panel_stride) {
  for (; n0 + S * kPanelColumns <= a.n_end; n0 += S * kPanelColumns) {
    panels_side_by_side<Isa, R, S, Out>(a, n0, a.panels + n0 / kPanelColumns * panel_stride,
                                        panel_stride);
  }
  if constexpr (S > 2) return side_by_side<Isa, R, S / 2, Out>(a, n0, panel_stride);
  return n0;
}

template <class Isa, int R, class Out>
inline int64_t side_by_side_of(const GemmArgs& a, int64_t n0, int64_t panel_stride) {
  if (a.m == R) return side_by_side<Isa, R, Isa::kFarPanels, Out>(a, n0, panel_stride);
  if constexpr (R > 1) return side_by_side_of<Isa, R - 1, Out>(a, n0, panel_stride);
  return n0;
}

// In tiles of Rows rows at most.
template <class Isa, int Rows, class Out>
inline void gemm_by(const GemmArgs& a, Out*) {
  constexpr int kPasses = static_cast<int>(kPanelColumns) / (Isa::kLanes * tile_vectors<Isa>(Rows));
  // Pairs are never split, so a tile has an even number of rows of them.
  constexpr int kPairRows = Rows < 2 ? 2 : Rows / 2 * 2;
  constexpr int kMostRows = Rows < kPairRows ? kPairRows : Rows;
  const int64_t unit = a.pairs ? 2 : 1;
  const int64_t units = a.m / unit;
  const int64_t strips = ceil_div(a.m, a.pairs ? kPairRows : Rows);
  if (strips == 0) return;
  const int64_t most_fetching = outgrows(a, kStaysInL2) ? kFarFetchStrips : kFetchStrips;
  const int64_t fetching = strips < most_fetching ? strips : most_fetching;
  const int64_t panel_stride = kPanelColumns * kGroup * (1 + a.groups);
  int64_t n0 = a.n_begin;
  if constexpr (Isa::kFarPanels > 1) {
    if (a.is_far && !a.pairs) {
      n0 = side_by_side_of<Isa, Rows, Out>(a, n0, panel_stride);
    }
  }
  for (; n0 < a.n_end; n0 += kPanelColumns) {
    const int64_t columns = a.n_end - n0 < kPanelColumns ? a.n_end - n0 : kPanelColumns;
    const int8_t* panel = a.panels + n0 / kPanelColumns * panel_stride;
    const PanelColumns values(a.epilogue, n0, columns);
    const TileOut<Out> to = panel_out<Out>(a, n0, panel, values);
    const int8_t* next = n0 + kPanelColumns < a.n_end ? panel + panel_stride : a.next;
    Ahead ahead = {};
    if (next != nullptr) ahead = {next, kPanelColumns * kGroup / (fetching * kPasses)};
    int64_t m0 = 0;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t rows = unit * (units / strips + (s < units % strips ? 1 : 0));
      if (s == fetching) ahead = {};
      strip_of<Isa, kMostRows>(rows, a, m0, panel, columns, to, ahead);
      m0 += rows;
    }
  }
}

// Panels that outgrow the L1 cache come from behind it once for each strip of rows. Where the
// weight outgrows the L2 cache as well, and few rows share the wait, higher and narrower tiles,
// which halve what comes and fetch ahead, are up to a fifth faster; elsewhere they are slower, by
// 5% at 48 rows.
template <class Isa, class Out>
inline void gemm_to(const GemmArgs& a, Out* out) {
  if constexpr (Isa::kLongTileRows != Isa::kTileRows) {
    if (a.m <= kLongTileMostRows && a.groups * kGroup * kPanelColumns > kStaysInL1 &&
        outgrows(a, kStaysInL2)) {
      return gemm_by<Isa, Isa::kLongTileRows>(a, out);
    }
  }
  gemm_by<Isa, Isa::kTileRows>(a, out);
}

template <class Isa>
void gemm(const GemmArgs& a) {
  with_out_type(a.epilogue.out_dtype, [&](auto* out) { gemm_to<Isa>(a, out); });
}

}  // namespace
}  // namespace dynquant
