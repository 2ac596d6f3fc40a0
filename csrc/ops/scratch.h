// Memory for staged activations that a thread keeps between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dynquant {

// At least `bytes` bytes at a cache line's start, the calling thread's own until its next call.
uint8_t* scratch(size_t bytes);

}  // namespace dynquant
