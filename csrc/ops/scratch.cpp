#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace dynquant {
namespace {

constexpr size_t kLine = 64;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Memory {
  std::unique_ptr<uint8_t, Free> bytes;
  size_t capacity = 0;

  void give_back() {
    bytes.reset();
    capacity = 0;
  }
};

thread_local Memory memories[static_cast<size_t>(Purpose::count)];
thread_local int depth = 0;            // of scopes within each other
thread_local bool holds_much = false;  // some memory is larger than kKeptScratch

}  // namespace

uint8_t* scratch(size_t bytes, Purpose purpose) {
  Memory& memory = memories[static_cast<size_t>(purpose)];
  if (bytes > memory.capacity) {
    const size_t rounded = (bytes + kLine - 1) / kLine * kLine;
    memory.give_back();
    memory.bytes.reset(static_cast<uint8_t*>(std::aligned_alloc(kLine, rounded)));
    if (memory.bytes == nullptr) throw std::bad_alloc();
    memory.capacity = rounded;
    holds_much = holds_much || rounded > kKeptScratch;
  }
  return memory.bytes.get();
}

void begin_scratch() { ++depth; }

void end_scratch() {
  if (--depth > 0 || !holds_much) return;
  for (Memory& memory : memories) {
    if (memory.capacity > kKeptScratch) memory.give_back();
  }
  holds_much = false;
}

}  // namespace dynquant
