// Between a plain weight int8 [N, K] and the packed layout (layout.h), one panel or row at a time.
#pragma once

#include <stdint.h>

namespace dynquant {

// Writes what surrounds the panels: the header and the padding.
void pack_header(int8_t* packed, int64_t n, int64_t k);

// Writes panel `p` of a weight whose rows are `stride` bytes apart.
void pack_panel(const int8_t* weight, int64_t stride, int64_t n, int64_t k, int64_t p,
                int8_t* packed);

// Reads row `row` of the weight back.
void unpack_row(const int8_t* packed, int64_t k, int64_t row, int8_t* out);

}  // namespace dynquant
