// Few rows and a weight that comes from memory, several panels side by side.
//
// Memory gives more to several streams of reads than to one with any fetching ahead: 1.3 to 1.5
// times with four on an AMD Zen 3. They have to alternate as finely as this: 1 KB of each in turn
// is slower, 4 KB no better than one stream. An Intel Ice Lake gives 1.1 to 1.2 times with four,
// 1.2 to 1.25 with eight, which sixteen do not exceed, and 1.25 to 1.45 where the program fetches
// 4 KB ahead in each of eight, into the L1 cache: 1 KB ahead, or in four panels, gains nothing. On
// an AMD Zen 4, whose L1 cache that would fill, it is 0.6 to 0.8 times as fast as nothing fetched,
// and on an Intel Emerald Rapids, with 2 MiB of L2 cache, 0.92 times.
//
// The sums of a panel wait in the L1 cache for its turn, so where the weight comes from a cache it
// is slower than panel by panel: 0.9 times from the L3 cache, 0.55 to 0.8 from the L2 cache. How
// many rows are few depends on the sums that a set takes in one instruction: AVX2 loses from three
// on (Zen 3), the sets with VPDPBUSD gain up to the six of a tile (1.1 to 1.2 times) on an Ice
// Lake, whose L1 cache has 48 KB. On a Zen 4, with 32 KB and nothing fetched, up to three rows are
// level and four gain (1.08 times), but six are 0.75 to 0.9 times as fast; in the 256-bit form one
// and two gain up to twice the speed.
#pragma once

#include "cache_bytes.h"
#include "group.inl.h"

namespace dynquant {
namespace {

// The sums of R rows and the columns of one panel.
template <class Isa, int R>
class PanelSums {
 public:
  inline void clear() {
    for (auto& tile : acc_) dynquant::clear<Isa>(tile);
  }
  // Takes in G groups, one tile after the other.
  template <int G>
  inline void multiply(const uint8_t* staged, int64_t staged_stride, const int8_t* weights) {
#pragma GCC unroll 16
    for (int t = 0; t < kTiles; ++t) {
      typename Isa::Int sums[R][kVectors];
      copy(acc_[t], sums);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        multiply_group<Isa, R, kVectors>(staged + g * Isa::kGroupBytes, staged_stride,
                                         weights + (g * kPanelColumns + t * kColumns) * kGroup,
                                         sums);
      }
      copy(sums, acc_[t]);
    }
  }
  // `end` is where the groups of the rows end.
  template <class Out>
  inline void store(const uint8_t* end, int64_t staged_stride, const TileOut<Out>& to) {
    for (int t = 0; t < kTiles; ++t) {
      take_excess<Isa>(end, staged_stride, acc_[t]);
      finish_rows<Isa>(acc_[t], to.at(0, t * kColumns));
    }
  }

 private:
  static constexpr int kVectors = tile_vectors<Isa>(R);
  static constexpr int kColumns = kVectors * Isa::kLanes;
  static constexpr int kTiles = static_cast<int>(kPanelColumns) / kColumns;
  using Tile = typename Isa::Int[R][kVectors];

  static inline void copy(const Tile& from, Tile& to) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) to[r][v] = from[r][v];
    }
  }

  Tile acc_[kTiles];
};

// The first `count` panels from n0 on, all of them whole.
template <class Isa, int R, class Out>
__attribute__((noinline)) void panels_side_by_side(const GemmArgs& a, int64_t n0, int count,
                                                   const int8_t* panel, int64_t panel_stride,
                                                   int64_t ahead) {
  constexpr int kTurn = 2;
  constexpr int64_t kStep = kPanelColumns * kGroup;
  PanelSums<Isa, R> sums[Isa::kReading.panels];
  for (int s = 0; s < count; ++s) sums[s].clear();
  const uint8_t* staged = a.staged;
  const int8_t* weights = panel + kStep;
  int64_t g = 0;
  for (; g + kTurn <= a.groups; g += kTurn) {
    for (int s = 0; s < count; ++s) {
      const int8_t* from = weights + s * panel_stride;
      if (ahead != 0) {
#pragma GCC unroll 16
        for (int64_t c = 0; c < kTurn * kStep; c += kLine) __builtin_prefetch(from + ahead + c);
      }
      sums[s].template multiply<kTurn>(staged, a.staged_stride, from);
    }
    staged += kTurn * Isa::kGroupBytes;
    weights += kTurn * kStep;
  }
  if (g < a.groups) {
    for (int s = 0; s < count; ++s) {
      sums[s].template multiply<1>(staged, a.staged_stride, weights + s * panel_stride);
    }
    staged += Isa::kGroupBytes;
  }
  for (int s = 0; s < count; ++s) {
    const int64_t n = n0 + s * kPanelColumns;
    const PanelColumns values(a.epilogue, n, kPanelColumns);
    sums[s].store(staged, a.staged_stride, panel_out<Out>(a, n, panel + s * panel_stride, values));
  }
}

// Where the rows are R at most.
template <class Isa, int R, class Out>
inline int64_t side_by_side(const GemmArgs& a, int64_t n0, int64_t panel_stride,
                            const Reading& reading) {
  if (a.m == R) {
    while (a.n_end - n0 >= kPanelColumns) {
      const int64_t left = (a.n_end - n0) / kPanelColumns;
      const int count = left < reading.panels ? static_cast<int>(left) : reading.panels;
      panels_side_by_side<Isa, R, Out>(a, n0, count, a.panels + n0 / kPanelColumns * panel_stride,
                                       panel_stride, reading.far_ahead);
      n0 += count * kPanelColumns;
    }
  }
  if constexpr (R > 1) return side_by_side<Isa, R - 1, Out>(a, n0, panel_stride, reading);
  return n0;
}

// How weights from memory are read where this runs: what is fetched ahead must not fill the L1
// cache, or it drives out what waits there. Cores with a large L2 cache fetch into it themselves,
// up to what one core gets from memory.
template <class Isa>
inline const Reading& reading_here() {
  static constexpr Reading kWithoutFetching = {4, 4, 0, Isa::kReading.near_ahead};
  static_assert(kWithoutFetching.panels <= Isa::kReading.panels);
  const int64_t fetched = Isa::kReading.panels * Isa::kReading.far_ahead;
  constexpr int64_t kLargeL2 = 2 * 1024 * 1024;
  const bool fetches = fetched < l1_bytes() && l2_bytes() < kLargeL2;
  return fetches ? Isa::kReading : kWithoutFetching;
}

// The whole panels from n0 on, where the rows are few. Gives the column behind them.
template <class Isa, class Out>
inline int64_t side_by_side(const GemmArgs& a, int64_t n0, int64_t panel_stride) {
  const Reading& reading = reading_here<Isa>();
  if (a.m > reading.few_rows) return n0;
  return side_by_side<Isa, Isa::kReading.few_rows, Out>(a, n0, panel_stride, reading);
}

}  // namespace
}  // namespace dynquant
