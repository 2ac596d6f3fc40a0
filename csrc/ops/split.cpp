#include "split.h"

#include <algorithm>

#include "../cpu/cache_bytes.h"
#include "../cpu/layout.h"
#include "parallel.h"

namespace dynquant {
namespace {

// A product as the choice sees it: rows in multiples, columns in panels.
struct Work {
  int64_t m, units, panels;
  double k;
  Costs costs;
  int64_t row_multiple;

  // Of the largest of so many parts of the rows.
  double rows_of_part(int64_t parts) const {
    return static_cast<double>(std::min(m, ceil_div(units, parts) * row_multiple));
  }
  double stage(int64_t row_parts) const {
    return stage_nanoseconds(costs, rows_of_part(row_parts), k);
  }
  double multiply(int64_t row_parts, int64_t column_parts) const {
    const double part_panels = static_cast<double>(ceil_div(panels, column_parts));
    return multiply_nanoseconds(costs, rows_of_part(row_parts), part_panels, k);
  }
};

Work work_of(int64_t m, int64_t n, int64_t k, const Costs& costs, int64_t row_multiple) {
  return {m,
          ceil_div(m, row_multiple),
          panels_of(n),
          static_cast<double>(k),
          split_costs(costs, n, k),
          row_multiple};
}

}  // namespace

Costs split_costs(const Costs& costs, int64_t n, int64_t k) {
  Costs of_split = costs;
  if (n * k > l2_bytes()) of_split.weight_byte = std::max(costs.weight_byte, costs.far_weight_byte);
  return of_split;
}

Split choose_split(int64_t m, int64_t n, int64_t k, int64_t threads, const Costs& costs,
                   int64_t row_multiple) {
  Split best{1, 1, row_multiple, 1, false};
  const Work work = work_of(m, n, k, costs, row_multiple);
  if (threads < 2 || work.units == 0 || work.panels == 0) return best;
  const double wake = region_nanoseconds(Threads::kPool, threads);
  double least = work.stage(1) + work.multiply(1, 1);
  if (least <= wake) return best;
  const auto consider = [&](int64_t row_parts) {
    row_parts = std::min(row_parts, work.units);
    // As few as give parts of that size: more would have nothing to do.
    const int64_t most = std::max<int64_t>(1, std::min(threads / row_parts, work.panels));
    const int64_t column_parts = ceil_div(work.panels, ceil_div(work.panels, most));
    const double product = wake + work.multiply(row_parts, column_parts);
    const double first = wake + work.stage(threads), apart = work.stage(row_parts);
    const double candidate = product + std::min(first, apart);
    if (candidate < least) {
      least = candidate;
      best = {row_parts, column_parts, row_multiple, 1, first < apart};
    }
  };
  // Each number of row parts that is a power of two, or leaves one to the columns.
  for (int64_t parts = 1; parts <= threads; parts *= 2) {
    consider(parts);
    consider(threads / parts);
  }
  // And as many as there are threads for each panel.
  consider(std::max<int64_t>(1, threads / work.panels));
  return best;
}

Split in_small_parts(const Split& split, int64_t n) {
  constexpr int64_t kPanelsTogether = 4;  // all or half of those that a set reads side by side
  constexpr int64_t kLeastParts = 4, kMostParts = 8;  // of a thread
  const int64_t units = ceil_div(panels_of(n), kPanelsTogether);
  if (split.rows != 1 || split.columns == 1 || units < kLeastParts * split.columns) return split;
  const int64_t columns = std::min(units, split.columns * kMostParts);
  return {1, columns, split.row_multiple, kPanelsTogether, true};
}

Part part_of(const Split& split, int64_t task, int64_t m, int64_t n) {
  const int64_t row = task / split.columns, column = task % split.columns;
  const int64_t units = ceil_div(m, split.row_multiple);
  const int64_t columns = split.panel_multiple * kPanelColumns, wide = ceil_div(n, columns);
  return {units * row / split.rows * split.row_multiple,
          std::min(m, units * (row + 1) / split.rows * split.row_multiple),
          std::min(n, wide * column / split.columns * columns),
          std::min(n, wide * (column + 1) / split.columns * columns)};
}

}  // namespace dynquant
