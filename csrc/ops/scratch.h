// Memory that a thread keeps between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dynquant {

enum class Purpose {
  staged_rows,
  shared_rows,
  bytes_of_row,
  recurrence,
  block,
  attention,
  head_rows,
  distances,
  count
};

// At least `bytes` bytes at a cache line's start, the calling thread's own until its next call for
// the same purpose or the end of the op. Called within an OpScope.
uint8_t* scratch(size_t bytes, Purpose purpose = Purpose::staged_rows);

// Blocks larger than this are given back at the end of an op, and asked for again by the next. Only
// recurrent layers with thousands of sequences need as much: with 4,096 of 1,024 states (137 MB)
// the page faults made a call of one step take half as long again (0.19 s of one core became 0.29),
// one of four steps a quarter.
constexpr size_t kKeptScratch = size_t{64} << 20;

// Around the work of an op in this thread; may be nested, and the outermost end gives back.
void begin_scratch();
void end_scratch();

}  // namespace dynquant
