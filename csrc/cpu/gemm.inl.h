// The product of staged activations and a packed weight, written once over an `Isa` type.
//
// A tile is R rows by V registers of columns. Its sums stay in registers over the whole of K, so no
// int32 ever travels through memory: a weight register is loaded once for R rows, an activation is
// broadcast once for V registers. Rows are split evenly (32 rows are 6, 6, 5, 5, 5, 5), because a
// last tile of two rows would run at a third of the speed.
#pragma once

#include "cache_bytes.h"
#include "far.inl.h"
#include "group.inl.h"

namespace dynquant {
namespace {

// The next panel on its way to the L2 cache while this one is computed: two lines for each group of
// the first strips, which at few rows is a little more than the panel has. With one line, whose
// neighbour comes with it, models of few rows are up to a tenth slower. The processor's own
// prefetcher stops at each page, and models whose weights outgrow the L2 cache together wait for
// every one of them.
struct Ahead {
  const int8_t* at = nullptr;
  int64_t step = 0;  // bytes for each group; 0: nothing is fetched
};

constexpr int64_t kStaysInL2 = 1024 * 1024;  // a weight that the L2 cache keeps between calls
// Strips that fetch the next panel; the others find it there. The L3 cache gives it more slowly
// than four strips would have it: with those, 128 rows of a model's weights are 0.92 to 0.95 times
// as fast on an Intel Ice Lake.
constexpr int64_t kFetchStrips = 16;
// This panel, on its way from the L2 to the L1 cache: a tile narrower than a panel reads a line
// here and there, which no prefetcher follows well. A single row of AVX2 is 1.03 to 1.08 times as
// fast on an AMD Zen 3; one of AVX-512 is 0.8 times as fast on an Intel Ice Lake where the L2 cache
// has the weight.
constexpr int64_t kNearGroups = 8;

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
    if constexpr (kBytes < kStep || (R == 1 && Isa::kReading.near_ahead)) {
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
  finish_rows<Isa>(acc, to);
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
  const int64_t fetching = strips < kFetchStrips ? strips : kFetchStrips;
  const int64_t panel_stride = kPanelColumns * kGroup * (1 + a.groups);
  int64_t n0 = a.n_begin;
  if (a.is_far) n0 = side_by_side<Isa, Out>(a, n0, panel_stride);
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

// Whether higher and narrower tiles are faster, of which there are fewer strips of rows: panels
// that outgrow the L1 cache come from behind it once for each. They are where the weight outgrows
// the L2 cache as well and all rows are one strip of theirs and two of the others. Of a few strips
// more, an Intel Cascade Lake has 1.09 times the speed with them, and an Ice Lake, with half as
// much L1 cache again, 0.8.
template <class Isa>
inline bool wants_long_tiles(const GemmArgs& a) {
  constexpr int64_t kMostRows = 32;
  const int64_t panel = a.groups * kGroup * kPanelColumns;
  if (a.m <= Isa::kTileRows || a.m > kMostRows || panel <= kSmallestL1) return false;
  if ((a.n_end - a.n_begin) * a.groups * kGroup <= kStaysInL2) return false;
  return a.m <= Isa::kLongTileRows || l1_bytes() <= kSmallestL1;
}

template <class Isa, class Out>
inline void gemm_to(const GemmArgs& a, Out* out) {
  if constexpr (Isa::kLongTileRows != Isa::kTileRows) {
    if (wants_long_tiles<Isa>(a)) return gemm_by<Isa, Isa::kLongTileRows>(a, out);
  }
  gemm_by<Isa, Isa::kTileRows>(a, out);
}

template <class Isa>
void gemm(const GemmArgs& a) {
  with_out_type(a.epilogue.out_dtype, [&](auto* out) { gemm_to<Isa>(a, out); });
}

}  // namespace
}  // namespace dynquant
