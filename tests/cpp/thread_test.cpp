// Several threads that use at once what the ops share, first uses included, while another forces
// instruction sets: without Python, whose lock would keep first uses apart. For `make
// sanitize-threads`; a wrong result ends it with 1.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/ops/cache.h"
#include "../../csrc/ops/huge_pages.h"
#include "../../csrc/ops/kept_memory.h"
#include "../../csrc/ops/scratch.h"

namespace {

constexpr int kCallers = 4, kRounds = 2000;
constexpr int64_t kValues = 1000;

std::atomic<int> waiting{kCallers + 1};
std::atomic<int> callers_left{kCallers};
std::atomic<int> wrong{0};

void start_together() {
  --waiting;
  while (waiting.load() > 0) {
  }
}

void force_sets() {
  int count = 0;
  start_together();
  const dynquant::IsaEntry* entries = dynquant::isa_entries(&count);
  while (callers_left.load() > 0) {
    for (int i = 0; i < count; ++i) {
      if (entries[i].missing() == nullptr && !dynquant::set_kernels(entries[i].kernels()->name)) {
        ++wrong;
      }
    }
  }
}

// The range of values that are known, by whichever kernels are in use, from memory of the thread.
void call(int caller) {
  dynquant::begin_scratch();
  const size_t bytes = static_cast<size_t>(kValues) * sizeof(float);
  float* values = reinterpret_cast<float*>(dynquant::scratch(bytes));
  for (int64_t i = 0; i < kValues; ++i) values[i] = static_cast<float>(i * (caller + 1));
  const dynquant::Kernels* kernels = dynquant::current_kernels();
  const dynquant::Range range = kernels->range(values, dynquant::Dtype::f32, kValues);
  const float highest = static_cast<float>((kValues - 1) * (caller + 1));
  if (range.lo != 0.0f || range.hi != highest || range.has_nan) ++wrong;
  if (dynquant::half_of_l2() <= 0) ++wrong;
  dynquant::end_scratch();
}

void call_often(int caller) {
  start_together();
  dynquant::keep_freed_memory();
  std::vector<char> large(size_t{8} << 20);
  dynquant::advise_huge_pages(large.data(), static_cast<int64_t>(large.size()));
  for (int round = 0; round < kRounds; ++round) call(caller);
  --callers_left;
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (int caller = 0; caller < kCallers; ++caller) threads.emplace_back(call_often, caller);
  threads.emplace_back(force_sets);
  for (std::thread& thread : threads) thread.join();
  std::printf("thread_test: %d callers, %d calls each, %d wrong\n", kCallers, kRounds,
              wrong.load());
  return wrong.load() == 0 ? 0 : 1;
}
