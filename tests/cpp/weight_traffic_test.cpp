// Which weights a thread is taken to have near. A wrong answer ends it with 1.
#include "../../csrc/ops/weight_traffic.h"

#include <cstdio>
#include <thread>
#include <vector>

using dynquant::comes_from_memory;
using dynquant::kStaysInL3;

namespace {

constexpr int64_t kBytes = 1 << 20;  // of each weight, next to each other
const std::vector<char> memory(static_cast<size_t>(4 * kStaysInL3));
int wrong = 0;

void expect(bool from_memory, int64_t weight, const char* when, int64_t threads = 1) {
  if (comes_from_memory(memory.data() + weight * kBytes, kBytes, threads) == from_memory) return;
  std::printf("weight %ld should %scome from memory %s\n", static_cast<long>(weight),
              from_memory ? "" : "not ", when);
  ++wrong;
}

}  // namespace

int main() {
  constexpr int64_t kFitting = kStaysInL3 / kBytes;
  for (int64_t w = 0; w < kFitting; ++w) expect(true, w, "at first");
  for (int64_t w = 0; w < kFitting; ++w) expect(false, w, "where all of them fit");
  std::thread([] { expect(true, 0, "in another thread"); }).join();
  for (int64_t w = 0; w < kFitting; ++w) expect(false, w, "again");
  for (int64_t w = kFitting; w < 2 * kFitting; ++w) expect(true, w, "at first");
  for (int64_t w = 0; w < 2 * kFitting; ++w) expect(true, w, "where they do not fit");
  // One that outgrows the cache comes from memory each time.
  for (int i = 0; i < 2; ++i) {
    if (!comes_from_memory(memory.data(), 2 * kStaysInL3, 1)) ++wrong;
    if (i == 1) expect(true, 1, "behind a large one");
  }
  // Many threads have more of it together.
  constexpr int64_t kThreads = 8, kFirst = 2 * kFitting, kEnd = 4 * kFitting;
  for (int64_t w = kFirst; w < kEnd; ++w) expect(true, w, "for the first of many", kThreads);
  for (int64_t w = kFirst; w < kEnd; ++w) expect(false, w, "for the first of many", kThreads);
  expect(true, kFirst, "for one thread after them");
  std::printf("weight_traffic_test: %d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
