// Which kernel computes a product, and in how many parts of K: a cost model written as data.
//
// Times are in cycles of one multiprocessor. The figures follow from published instruction and
// memory rates; they have not been fitted to measurements.
#pragma once

#include "gemm.inl.h"
#include "gemv.inl.h"

namespace dynquant {

enum class Method : int32_t { gemv, large, wide, square, low, least };

struct MethodCost {
  Method method;
  int64_t least_m, most_m;    // rows that it may be used for
  int64_t tile_m, tile_n;     // of a block
  int64_t step_k;             // parts of K are multiples of it
  double products_per_cycle;  // multiply-adds of a multiprocessor that is full of such blocks
  int64_t resident;           // blocks of a multiprocessor
  double start;               // cycles before the first product and after the last
};

constexpr int64_t kAnyM = int64_t{1} << 62;
constexpr int64_t kGemvRows = 4;
constexpr MethodCost kMethods[] = {
    {Method::gemv, 1, kGemvRows, kGemvRows, 64, 16, 200, 4, 1500},
    {Method::least, kGemvRows + 1, kAnyM, LeastTile::kM, LeastTile::kN, kStepK, 350, 8, 2000},
    {Method::low, kGemvRows + 1, kAnyM, LowTile::kM, LowTile::kN, kStepK, 600, 6, 2000},
    {Method::square, kGemvRows + 1, kAnyM, SquareTile::kM, SquareTile::kN, kStepK, 900, 4, 2200},
    {Method::wide, kGemvRows + 1, kAnyM, WideTile::kM, WideTile::kN, kStepK, 1150, 3, 2500},
    {Method::large, kGemvRows + 1, kAnyM, LargeTile::kM, LargeTile::kN, kStepK, 1400, 2, 3000},
};
constexpr int kPartCounts[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32};
constexpr int64_t kMostSplitRows = 64;       // beyond them sums of parts cost more than they give
constexpr double kWeightBytesPerCycle = 14;  // of one multiprocessor, from memory
constexpr double kSumBytesPerCycle = 30;     // sums of parts, to and from L2
constexpr double kSecondKernel = 4000;       // the start of the kernel that adds up the parts

struct Plan {
  Method method;
  int parts;
};

constexpr double cost_of(const MethodCost& c, int64_t m, int64_t n, int64_t k, int parts,
                         int64_t processors) {
  const int64_t blocks = ceil_div(m, c.tile_m) * ceil_div(n, c.tile_n) * parts;
  const int64_t at_once = c.resident * processors;
  const int64_t waves = ceil_div(blocks, at_once);
  const int64_t beside = ceil_div(blocks < at_once ? blocks : at_once, processors);
  const int64_t depth = ceil_div(ceil_div(k, c.step_k), parts) * c.step_k;
  const int64_t rows = m < c.tile_m && c.method == Method::gemv ? m : c.tile_m;
  const double products = static_cast<double>(rows * c.tile_n * depth * beside);
  const double work = products / c.products_per_cycle;
  const double bytes = static_cast<double>(c.tile_n * depth * beside);
  const double reading = bytes / kWeightBytesPerCycle;
  double cost = static_cast<double>(waves) * (c.start + (work > reading ? work : reading));
  if (parts > 1) {
    const double sums = 8.0 * static_cast<double>(m * n * parts);
    cost += kSecondKernel + sums / (kSumBytesPerCycle * static_cast<double>(processors));
  }
  return cost;
}

// m, n > 0.
constexpr Plan choose_plan(int64_t m, int64_t n, int64_t k, int64_t processors) {
  Plan best = {Method::large, 1};
  double least = -1;
  for (const MethodCost& c : kMethods) {
    if (m < c.least_m || m > c.most_m) continue;
    for (int parts : kPartCounts) {
      if (parts > 1 && (m > kMostSplitRows || parts > ceil_div(k, c.step_k))) break;
      const double cost = cost_of(c, m, n, k, parts, processors);
      if (least < 0 || cost < least) {
        least = cost;
        best = {c.method, parts};
      }
    }
  }
  return best;
}

}  // namespace dynquant
