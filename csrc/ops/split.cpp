#include "split.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "../cpu/layout.h"
#include "parallel.h"

namespace dynquant {
namespace {

// Costs in multiply-adds of one core (230 a nanosecond), measured on a Zen 4 with AVX512-VNNI. On
// slower instruction sets a product costs more, so what pays here pays there.
constexpr double kWeightByte = 2.5;    // one weight byte from the L2 or L3 cache: 90 GB/s
constexpr double kQuantizeValue = 30;  // reading, ranging and rounding one activation: 0.13 ns
constexpr double kPanelRow = 1300;     // the epilogue of one row of one panel: 6 ns
// A parallel region: 2 microseconds where the pool's threads still spin, and one more, so that no
// call is slower for it; 48 where they were told to sleep between regions, and
// about as many to start threads, as a forked child does.
constexpr double kSpinningThreads = 0.7e6;
constexpr double kSleepingThreads = 11.5e6;

bool equals(const char* name, std::string_view wanted) {
  const char* value = std::getenv(name);
  if (value == nullptr || std::strlen(value) != wanted.size()) return false;
  return std::equal(wanted.begin(), wanted.end(), value, [](char a, char b) {
    return a == std::tolower(static_cast<unsigned char>(b));
  });
}

// As the OpenMP run-time libraries read it: once, from the environment.
double wake_threads() {
  static const bool sleep = equals("OMP_WAIT_POLICY", "passive") || equals("GOMP_SPINCOUNT", "0") ||
                            equals("KMP_BLOCKTIME", "0");
  return sleep || is_forked_child() ? kSleepingThreads : kSpinningThreads;
}

double cost(int64_t m, int64_t n, int64_t k, int64_t row_parts, int64_t column_parts) {
  const double rows = static_cast<double>(ceil_div(m, row_parts));
  const double columns = static_cast<double>(ceil_div(panels_of(n), column_parts) * kPanelColumns);
  const double depth = static_cast<double>(k);
  const double product = std::max(rows, kWeightByte) * columns * depth;
  return product + rows * columns / kPanelColumns * kPanelRow + rows * depth * kQuantizeValue;
}

}  // namespace

Split choose_split(int64_t m, int64_t n, int64_t k, int64_t threads) {
  Split best{1, 1};
  const double wake = wake_threads();
  double least = cost(m, n, k, 1, 1);
  for (int64_t used = 2; used <= threads; ++used) {
    for (int64_t row_parts = 1; row_parts <= std::min(used, m); ++row_parts) {
      if (used % row_parts != 0) continue;
      const double candidate = cost(m, n, k, row_parts, used / row_parts) + wake;
      if (candidate < least) {
        least = candidate;
        best = {row_parts, used / row_parts};
      }
    }
  }
  return best;
}

Part part_of(const Split& split, int64_t task, int64_t m, int64_t n) {
  const int64_t row = task / split.columns, column = task % split.columns;
  const int64_t panels = panels_of(n);
  return {m * row / split.rows, m * (row + 1) / split.rows,
          panels * column / split.columns * kPanelColumns,
          std::min(n, panels * (column + 1) / split.columns * kPanelColumns)};
}

}  // namespace dynquant
