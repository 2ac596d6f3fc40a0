// Memory that a thread keeps between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dynquant {

enum class Purpose { staged_rows, shared_rows, recurrence, block, attention, head_rows, count };

// At least `bytes` bytes at a cache line's start, the calling thread's own until its next call for
// the same purpose.
uint8_t* scratch(size_t bytes, Purpose purpose = Purpose::staged_rows);

}  // namespace dynquant
