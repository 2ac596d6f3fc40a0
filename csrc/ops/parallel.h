// Work on torch's own threads, each with the arithmetic of the specification; the calling thread
// has it from the op's entry (implement.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "op_scope.h"

namespace dynquant {

inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// f(task) for each task; inside another parallel region, or with one task, in the calling thread.
template <class F>
void run_tasks(int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  if (tasks <= 0) return;
  torch::stable::parallel_for(0, tasks, 1, [&f](int64_t begin, int64_t end) {
    const OpScope scope;
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

// f(begin, end) over [0, count) in as many even parts as there are threads, or in one where each
// item's `cost` (in bytes or operations) adds up to too little for a thread to be worth waking.
template <class F>
void run_range(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kWorthAThread = 1 << 16;
  const int64_t worth = count * std::max<int64_t>(cost, 1) / kWorthAThread;
  const int64_t parts = std::max<int64_t>(1, std::min({num_threads(), count, worth}));
  run_tasks(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
}

}  // namespace dynquant
