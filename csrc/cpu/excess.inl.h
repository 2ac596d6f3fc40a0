// What the products of a staged row have too much in every column, which stands behind its groups
// where an `Isa` has an offset.
#pragma once

#include <stdint.h>
#include <string.h>

namespace dynquant {
namespace {

inline void set_excess(uint8_t* behind, int32_t excess) { memcpy(behind, &excess, sizeof excess); }
inline int32_t excess_at(const uint8_t* behind) {
  int32_t excess;
  memcpy(&excess, behind, sizeof excess);
  return excess;
}

}  // namespace
}  // namespace dynquant
