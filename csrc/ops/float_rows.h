// How rows of floats lie in a thread's memory.
#pragma once

#include "../cpu/kernels.h"
#include "../cpu/layout.h"

namespace dynquant {

// How many values a row has where it is filled up.
inline int64_t filled_up(int64_t values) { return ceil_div(values, kPartials) * kPartials; }

// Values from one row to the next. Rows at a power of two would share few cache sets: a line more
// between them spreads them.
inline int64_t row_stride_of(int64_t values) { return filled_up(values) + kPartials; }

}  // namespace dynquant
