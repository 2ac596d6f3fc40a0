// The product on tensor cores: a block makes a tile (tile.h), or its sums over a part of K.
//
// Copies of later steps are under way while one is multiplied. A stage is written again only after
// a barrier that all threads reach once they have read it.
#pragma once

#include <type_traits>

#include "finish.inl.h"

namespace dynquant {

// What one block copies, step by step.
template <class Gpu, class Tile>
class StepCopies {
 public:
  DYNQUANT_DEVICE StepCopies(const ProductArgs& a, int64_t first_row, int64_t first_column)
      : groups_(groups_of(a.finish.k)),
        row_bytes_(ceil_div(a.finish.k, kChunk16) * kChunk16),
        stride_(a.q_stride),
        panel_stride_(panel_bytes(a.finish.k)),
        rows_(a.finish.m - first_row),
        panels_(panels_of(a.finish.n) - first_column / kPanelColumns),
        q_(a.q + first_row * a.q_stride),
        weights_(panel_of(a.finish, first_column / kPanelColumns) + kPanelColumns * kGroup) {}

  // Starts the copies of step `step` to `stage`.
  DYNQUANT_DEVICE void start(int64_t step, uint8_t* stage) const {
#pragma unroll
    for (int i = 0; i < Tile::kActivationCopies; ++i) {
      const int id = Gpu::thread() + i * Tile::kThreads;
      const int row = id / kStepChunks, chunk = id % kStepChunks;
      const int64_t byte = step * kStepK + chunk * kChunk16;
      const bool real = row < rows_ && byte < row_bytes_;
      Gpu::copy_async(stage + activation_offset(row, chunk), real ? q_ + row * stride_ + byte : q_,
                      real);
    }
#pragma unroll
    for (int i = 0; i < Tile::kWeightCopies; ++i) {
      const int id = Gpu::thread() + i * Tile::kThreads;
      const int chunk = id % kGroupChunks, group = id / kGroupChunks % kStepGroups;
      const int panel = id / (kGroupChunks * kStepGroups);
      const int64_t at = step * kStepGroups + group;
      const bool real = panel < panels_ && at < groups_;
      const int64_t offset = panel * panel_stride_ + (at * kGroupChunks + chunk) * kChunk16;
      const int column = panel * kPanelWidth + chunk * (kChunk16 / static_cast<int>(kGroup));
      Gpu::copy_async(stage + Tile::kActivationBytes + weight_offset(column, group),
                      real ? weights_ + offset : weights_, real);
    }
  }

 private:
  int64_t groups_, row_bytes_, stride_, panel_stride_, rows_, panels_;
  const uint8_t* q_;
  const int8_t* weights_;
};

template <class Tile>
struct GemmKernel {
  using Args = ProductArgs;
  using Sums = int32_t[Tile::kProducts][Tile::kSpans][kSpanProducts][4];
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kBlocks = 1;

  static constexpr int shared_bytes(bool async_copies) {
    return stages_of(Tile::kAsyncStages, async_copies) * Tile::kStageBytes;
  }
  static Grid grid(int64_t m, int64_t n, int splits) {
    return {ceil_div(m, Tile::kM) * ceil_div(n, Tile::kN), splits};
  }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    const int64_t row_tiles = ceil_div(a.finish.m, Tile::kM);
    const int64_t column_tiles = ceil_div(a.finish.n, Tile::kN);
    const TileAt tile = tile_at(Gpu::block_x(), row_tiles, column_tiles);
    const int64_t first_row = tile.row * Tile::kM, first_column = tile.column * Tile::kN;
    const Part steps = even_part(ceil_div(a.finish.k, kStepK), Gpu::block_y(), a.splits);
    const int warp = Gpu::thread() / 32;
    const int warp_row = warp / Tile::kColumnWarps * Tile::kWarpM;
    const int warp_column = warp % Tile::kColumnWarps * Tile::kWarpN;

    Sums sums = {};
    multiply<Gpu>(StepCopies<Gpu, Tile>(a, first_row, first_column), steps, a.flip, warp_row,
                  warp_column, sums);
    if (a.splits > 1) {
      int32_t* partial = a.partial + Gpu::block_y() * a.finish.m * a.finish.n;
      each_run<Gpu>(
          a.finish, first_row + warp_row, first_column + warp_column, sums,
          [](int64_t) { return 0; },
          [&](int, const int32_t (&run)[kRunColumns], int64_t row, int64_t column) {
            store_run<Gpu>(run, partial + row * a.finish.n + column, a.finish.n - column);
          });
    } else {
      store_results<Gpu>(a.finish, first_row + warp_row, first_column + warp_column, sums);
    }
  }

 private:
  template <class Gpu>
  static DYNQUANT_DEVICE void multiply(const StepCopies<Gpu, Tile>& copies, const Part& steps,
                                       uint32_t flip, int warp_row, int warp_column, Sums& sums) {
    constexpr int kStages = stages_of(Tile::kAsyncStages, Gpu::kAsyncCopies);
    uint8_t* const shared = Gpu::shared();
#pragma unroll
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      if (steps.begin + ahead < steps.end) {
        copies.start(steps.begin + ahead, shared + ahead * Tile::kStageBytes);
      }
      Gpu::commit();
    }
    int stage = 0, free_stage = kStages - 1;
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      Gpu::template wait<kStages - 2>();
      Gpu::sync();
      if (step + kStages - 1 < steps.end) {
        copies.start(step + kStages - 1, shared + free_stage * Tile::kStageBytes);
      }
      Gpu::commit();  // an empty group as well: wait counts groups
      multiply_step<Gpu>(shared + stage * Tile::kStageBytes, flip, warp_row, warp_column, sums);
      free_stage = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

  template <class Gpu>
  static DYNQUANT_DEVICE void multiply_step(const uint8_t* stage, uint32_t flip, int warp_row,
                                            int warp_column, Sums& sums) {
    const int lane = Gpu::thread() % 32;
#pragma unroll
    for (int product = 0; product < kStepK / kProductK; ++product) {
      constexpr int kChunks = kProductK / kChunk16, kGroups = kProductK / static_cast<int>(kGroup);
      uint32_t activations[Tile::kProducts][4];
#pragma unroll
      for (int p = 0; p < Tile::kProducts; ++p) {
        const int row = warp_row + p * kProductRows + fragment_row(lane);
        const int chunk = product * kChunks + fragment_chunk(lane);
        Gpu::load_fragment(stage + activation_offset(row, chunk), activations[p]);
#pragma unroll
        for (int i = 0; i < 4; ++i) activations[p][i] ^= flip;
      }
#pragma unroll
      for (int span = 0; span < Tile::kSpans; ++span) {
        const int column = warp_column + span * kSpanColumns + weight_column(lane);
        const int group = product * kGroups + weight_group(lane);
        const uint8_t* weights = stage + Tile::kActivationBytes;
        const Bytes16 low = Gpu::load_shared16(weights + weight_offset(column, group));
        const Bytes16 high = Gpu::load_shared16(weights + weight_offset(column, group + 4));
#pragma unroll
        for (int j = 0; j < kSpanProducts; ++j) {
#pragma unroll
          for (int p = 0; p < Tile::kProducts; ++p) {
            Gpu::mma(sums[p][span][j], activations[p], low.word[j], high.word[j]);
          }
        }
      }
    }
  }

  // Calls at_row(at_column(column), run, row, column) for each run of this lane's neighbouring sums
  // that starts inside, at_column once for all rows.
  template <class Gpu, class AtColumn, class AtRow>
  static DYNQUANT_DEVICE void each_run(const FinishArgs& f, int64_t warp_row, int64_t warp_column,
                                       const Sums& sums, const AtColumn& at_column,
                                       const AtRow& at_row) {
    const int lane = Gpu::thread() % 32;
#pragma unroll
    for (int span = 0; span < Tile::kSpans; ++span) {
      const int64_t column = warp_column + span * kSpanColumns + sum_column(lane, 0, 0);
      if (column >= f.n) continue;
      const auto columns = at_column(column);
#pragma unroll
      for (int p = 0; p < Tile::kProducts; ++p) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = warp_row + p * kProductRows + sum_row(lane, 2 * half);
          if (row >= f.m) continue;
          int32_t run[kRunColumns];
#pragma unroll
          for (int j = 0; j < kSpanProducts; ++j) {
            run[j] = sums[p][span][j][2 * half];
            run[j + 4] = sums[p][span][j][2 * half + 1];
          }
          at_row(columns, run, row, column);
        }
      }
    }
  }

  struct RunTerms {
    ColumnTerms column[kRunColumns];
  };

  template <class Gpu>
  static DYNQUANT_DEVICE void store_results(const FinishArgs& f, int64_t warp_row,
                                            int64_t warp_column, const Sums& sums) {
    const bool fits = header_fits(f);
    with_out(f, [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      each_run<Gpu>(
          f, warp_row, warp_column, sums,
          [&](int64_t column) {
            RunTerms terms;
#pragma unroll
            for (int i = 0; i < kRunColumns; ++i) {
              const int64_t inside = column + i < f.n ? column + i : column;
              terms.column[i] = terms_of_column(f, inside);
            }
            return terms;
          },
          [&](const RunTerms& terms, const int32_t (&run)[kRunColumns], int64_t row,
              int64_t column) {
            const RowTerms row_terms = terms_of_row(f, row);
            Out results[kRunColumns];
#pragma unroll
            for (int i = 0; i < kRunColumns; ++i) {
              finish<Gpu>(run[i], row_terms, terms.column[i], fits, results + i);
            }
            store_run<Gpu>(results, out + row * f.n + column, f.n - column);
          });
    });
  }
};

using LargeTile = Tile<128, 128, 2, 2, 4>;
using WideTile = Tile<64, 128, 2, 2, 4>;
using SquareTile = Tile<64, 64, 2, 2, 4>;
using LowTile = Tile<32, 64, 2, 2, 5>;
using LeastTile = Tile<16, 64, 1, 2, 5>;

}  // namespace dynquant
