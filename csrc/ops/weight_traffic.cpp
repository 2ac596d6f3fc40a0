#include "weight_traffic.h"

#include <stddef.h>

#include <array>

namespace dynquant {
namespace {

struct Read {
  const void* weight = nullptr;
  int64_t at = 0;  // how many bytes the thread had read before
};

// More than the weights that fit into that cache, where any is worth asking for.
constexpr size_t kSlots = 256;
thread_local std::array<Read, kSlots> reads;
thread_local int64_t total = 0;

Read& slot_of(const void* weight) {
  const uint64_t line = reinterpret_cast<uintptr_t>(weight) / 64;
  return reads[line * 0x9E3779B97F4A7C15u >> 56];
}

}  // namespace

bool comes_from_memory(const void* weight, int64_t bytes) {
  Read& last = slot_of(weight);
  const bool is_near = last.weight == weight && total - last.at <= kStaysInL3;
  last = {weight, total};
  total += bytes;
  return !is_near;
}

}  // namespace dynquant
