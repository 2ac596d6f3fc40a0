// Memory that a thread keeps between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dynquant {

enum class Purpose { staged_rows, recurrence, count };

// At least `bytes` bytes at a cache line's start, the calling thread's own until its next call for
// the same purpose or the end of the op. Called within an OpScope.
uint8_t* scratch(size_t bytes, Purpose purpose = Purpose::staged_rows);

// Blocks larger than this are given back at the end of an op, and asked for again by the next: a
// few percent of an op that needs that much, since it computes with every byte many times.
constexpr size_t kKeptScratch = size_t{32} << 20;

// Around the work of an op in this thread; may be nested, and the outermost end gives back.
void begin_scratch();
void end_scratch();

}  // namespace dynquant
