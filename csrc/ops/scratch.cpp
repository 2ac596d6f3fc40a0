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
};

}  // namespace

uint8_t* scratch(size_t bytes, Purpose purpose) {
  static thread_local Memory memories[static_cast<size_t>(Purpose::count)];
  Memory& memory = memories[static_cast<size_t>(purpose)];
  if (bytes > memory.capacity) {
    const size_t rounded = (bytes + kLine - 1) / kLine * kLine;
    memory.bytes.reset();
    memory.capacity = 0;
    memory.bytes.reset(static_cast<uint8_t*>(std::aligned_alloc(kLine, rounded)));
    if (memory.bytes == nullptr) throw std::bad_alloc();
    memory.capacity = rounded;
  }
  return memory.bytes.get();
}

}  // namespace dynquant
