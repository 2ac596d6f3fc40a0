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

}  // namespace

uint8_t* scratch(size_t bytes) {
  static thread_local std::unique_ptr<uint8_t, Free> memory;
  static thread_local size_t capacity = 0;
  if (bytes > capacity) {
    const size_t rounded = (bytes + kLine - 1) / kLine * kLine;
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kLine, rounded)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = rounded;
  }
  return memory.get();
}

}  // namespace dynquant
