#include "weight_traffic.h"

#include <stddef.h>

#include <algorithm>
#include <array>

namespace dynquant {
namespace {

struct Read {
  const void* weight = nullptr;
  int64_t at = 0;  // how many bytes had been read before
};

// For each thread: processors with more cores have more of these caches.
constexpr int64_t kLeastShare = 4 << 20;

// Sets of two: a model has tens of weights, and two that have one place would drive each other out
// at every call.
constexpr size_t kSets = 256;
thread_local std::array<std::array<Read, 2>, kSets> reads;
thread_local int64_t total = 0;

// What is known of a weight, or what was read longest ago of those in its place.
Read& entry_of(const void* weight) {
  const uint64_t line = reinterpret_cast<uintptr_t>(weight) / 64;
  auto& set = reads[line * 0x9E3779B97F4A7C15u >> 56];
  if (set[0].weight == weight) return set[0];
  if (set[1].weight == weight) return set[1];
  return set[0].at <= set[1].at ? set[0] : set[1];
}

}  // namespace

bool comes_from_memory(const void* weight, int64_t bytes, int64_t threads) {
  Read& last = entry_of(weight);
  const int64_t stays = std::max(kStaysInL3, threads * kLeastShare);
  const bool is_near = last.weight == weight && total - last.at <= stays;
  last = {weight, total};
  total += bytes;
  return !is_near;
}

}  // namespace dynquant
