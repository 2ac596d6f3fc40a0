// How a product is split over threads.
#pragma once

#include <stdint.h>

namespace dynquant {

struct Split {
  int64_t rows;     // parts of M; each reads the whole weight
  int64_t columns;  // parts of N; each quantizes all of its rows anew, which spares a barrier
};

// `bytes` of each activation: the product multiplies each row of M so many times.
Split choose_split(int64_t m, int64_t n, int64_t k, int64_t threads, int64_t bytes = 1);

// What one task of a product of M rows and N columns computes; columns by whole panels.
struct Part {
  int64_t m_begin, m_end;
  int64_t n_begin, n_end;

  bool is_empty() const { return m_begin >= m_end || n_begin >= n_end; }
};
Part part_of(const Split& split, int64_t task, int64_t m, int64_t n);

}  // namespace dynquant
