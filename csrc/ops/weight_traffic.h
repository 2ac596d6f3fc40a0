// Which weights, keys and values a thread has read lately: a product of few rows may read those
// from memory another way.
#pragma once

#include <stdint.h>

namespace dynquant {

// Measured with an L3 cache of 32 MiB, of which others have their part: from 13 MiB on, weights
// that are read in turn come from memory.
constexpr int64_t kStaysInL3 = 12 << 20;

// Asked for products of few rows, between which the others hardly count.
//
// Whether `bytes` of a weight come from memory: they, and what has been read for the calling thread
// since it asked for them last, are more than stays in an L3 cache, or it never did. It counts them
// as read. A guess from addresses: a weight in another's place is taken for that one, until it was
// read once.
//
// Args: weight, any address that stands for it and for no other; threads, that read together.
bool comes_from_memory(const void* weight, int64_t bytes, int64_t threads);

}  // namespace dynquant
