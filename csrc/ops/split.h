// How a product is split over threads.
#pragma once

#include <stdint.h>

#include "../cpu/costs.h"
#include "../cpu/kernels.h"

namespace dynquant {

struct Split {
  int64_t rows;            // parts of M; each reads the whole weight
  int64_t columns;         // parts of N
  int64_t row_multiple;    // parts of M begin at multiples of this
  int64_t panel_multiple;  // parts of N begin at multiples of so many panels
  // Rows are staged before, each once, on all threads; otherwise each part stages its rows for
  // itself, which spares a barrier.
  bool stage_first;

  int64_t parts() const { return rows * columns; }
};

#pragma GCC visibility push(default)  // the Python module shows them

// The costs by which a product by a weight [N, K] is split.
Costs split_costs(const Costs& costs, int64_t n, int64_t k);

// The split of a product of M rows by a weight [N, K] that costs least.
Split choose_split(int64_t m, int64_t n, int64_t k, int64_t threads, const Costs& costs,
                   int64_t row_multiple);

// The same in more parts than threads, for a weight [N, K] that comes from memory and threads that
// take one part after the other: one that comes late leaves more to the others. Too few columns for
// that are split as they were, and so are weights that cores have in their caches.
Split in_small_parts(const Split& split, int64_t n);

// What one task of a product of M rows and N columns computes; columns by whole panels.
struct Part {
  int64_t m_begin, m_end;
  int64_t n_begin, n_end;

  bool is_empty() const { return m_begin >= m_end || n_begin >= n_end; }
};
Part part_of(const Split& split, int64_t task, int64_t m, int64_t n);

#pragma GCC visibility pop

}  // namespace dynquant
