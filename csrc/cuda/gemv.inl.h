// The product for one to four rows: bound by reading the weight, which each block does once.
//
// A block has one panel, and a part of K where panels alone are too few blocks. Sixteen threads
// read the 256 bytes of a group, 16 bytes each, which are four columns; sixteen such parties share
// the groups, four neighbouring ones at a time, whose activations are 16 bytes as well.
#pragma once

#include "finish.inl.h"

namespace dynquant {

template <int Rows>
struct GemvKernel {
  using Args = ProductArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  static constexpr int kColumns = 4;  // of a thread
  static constexpr int kPartyThreads = kPanelWidth / kColumns;
  static constexpr int kParties = kThreads / kPartyThreads;
  static constexpr int kQuadGroups = 4;

  static constexpr int shared_bytes(bool) {
    return kParties * Rows * kPanelWidth * static_cast<int>(sizeof(int32_t));
  }
  static Grid grid(int64_t, int64_t n, int splits) { return {panels_of(n), splits}; }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    int32_t sums[Rows][kColumns] = {};
    multiply<Gpu>(a, sums);
    const int party = Gpu::thread() / kPartyThreads, first = Gpu::thread() % kPartyThreads;
    int32_t* const shared = reinterpret_cast<int32_t*>(Gpu::shared());
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        shared[(party * Rows + row) * kPanelWidth + first * kColumns + i] = sums[row][i];
      }
    }
    Gpu::sync();
    if (Gpu::thread() >= Rows * kPanelWidth) return;
    const int row = Gpu::thread() / kPanelWidth;
    const int64_t column = Gpu::block_x() * kPanelColumns + Gpu::thread() % kPanelWidth;
    if (column >= a.finish.n) return;
    uint32_t sum = 0;
    for (int i = 0; i < kParties; ++i) {
      sum += static_cast<uint32_t>(shared[i * Rows * kPanelWidth + Gpu::thread()]);
    }
    store<Gpu>(a, static_cast<int32_t>(sum), row, column);
  }

 private:
  template <class Gpu>
  static DYNQUANT_DEVICE void multiply(const Args& a, int32_t (&sums)[Rows][kColumns]) {
    constexpr int kGroupBytes = kPanelWidth * static_cast<int>(kGroup);
    const int64_t groups = groups_of(a.finish.k);
    const Part quads = even_part(ceil_div(groups, kQuadGroups), Gpu::block_y(), a.splits);
    const int party = Gpu::thread() / kPartyThreads;
    const int8_t* weights =
        panel_of(a.finish, Gpu::block_x()) + kGroupBytes + Gpu::thread() % kPartyThreads * kChunk16;
#pragma unroll 2
    for (int64_t quad = quads.begin + party; quad < quads.end; quad += kParties) {
      Bytes16 weight[kQuadGroups];
#pragma unroll
      for (int g = 0; g < kQuadGroups; ++g) {
        const int64_t group = quad * kQuadGroups + g;
        const Bytes16 zeros = {};
        weight[g] = group < groups ? Gpu::load16(weights + group * kGroupBytes) : zeros;
      }
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        const Bytes16 q = Gpu::load16(a.q + row * a.q_stride + quad * kChunk16);
#pragma unroll
        for (int g = 0; g < kQuadGroups; ++g) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            sums[row][i] = Gpu::dot(q.word[g] ^ a.flip, weight[g].word[i], sums[row][i]);
          }
        }
      }
    }
  }

  template <class Gpu>
  static DYNQUANT_DEVICE void store(const Args& a, int32_t sum, int row, int64_t column) {
    const FinishArgs& f = a.finish;
    if (a.splits > 1) {
      a.partial[(Gpu::block_y() * f.m + row) * f.n + column] = sum;
      return;
    }
    const bool fits = header_fits(f);
    const RowTerms row_terms = terms_of_row(f, row);
    const ColumnTerms column_terms = terms_of_column(f, column);
    with_out(f, [&](auto* out) {
      finish<Gpu>(sum, row_terms, column_terms, fits, out + row * f.n + column);
    });
  }
};

}  // namespace dynquant
