// Large pages for large outputs.
#pragma once

#include <stdint.h>

namespace dynquant {

// Asks the kernel for 2 MiB pages under [data, data + bytes) where that many are worth a system
// call, and for the small pages in front of and behind them at once. Only advice: where the system
// has none to give, nothing happens.
//
// The allocator gives large outputs fresh memory at most calls, and the page faults of 4 KiB pages
// cost as much as the product itself where K is small: 12 ms for 25 MB.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace dynquant
