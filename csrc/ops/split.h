// How a product is split over threads.
#pragma once

#include <stdint.h>

namespace dynquant {

struct Split {
  int64_t rows;     // parts of M; each reads the whole weight
  int64_t columns;  // parts of N; each quantizes all of its rows anew, which spares a barrier
};

Split choose_split(int64_t m, int64_t n, int64_t k, int64_t threads);

}  // namespace dynquant
