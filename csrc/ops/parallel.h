// Work on several threads, each with the arithmetic of the specification; the calling thread has it
// from the op's entry (implement.h).
//
// Calls of a model run on torch's own pool. Weights are quantized and packed on threads that end
// with the call, so that a process that has only made its model can still fork: a pool that was
// started does not live on in the child. In a forked child all work runs like that.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "op_scope.h"
#include "team.h"

namespace dynquant {

inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Whether this process came from fork(), without exec, after this library was loaded.
bool is_forked_child();

// run(context, begin, end) over [0, tasks) on up to num_threads() threads, which have ended on
// return; the calling one is one of them. The first exception is thrown again.
void on_own_threads(int64_t tasks, TaskRange run, const void* context);

enum class Threads { kPool, kOwn };

// f(task) for each task; inside another parallel region, or with one task, in the calling thread.
template <class F>
void run_tasks(Threads threads, int64_t tasks, const F& f) {
  if (tasks == 1) return f(0);
  if (tasks <= 0) return;
  const auto run = [&f](int64_t begin, int64_t end) {
    const OpScope scope;
    for (int64_t task = begin; task < end; ++task) f(task);
  };
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<decltype(&run)>(context))(begin, end);
  };
  if (threads == Threads::kOwn) return on_own_threads(tasks, call, &run);
  if (Team* team = led_team()) return team->run(tasks, call, &run);
  if (is_forked_child()) return on_own_threads(tasks, call, &run);
  torch::stable::parallel_for(0, tasks, 1, run);
}

template <class F>
void run_tasks(int64_t tasks, const F& f) {
  run_tasks(Threads::kPool, tasks, f);
}

// What a parallel region takes beside its work, in nanoseconds.
double region_nanoseconds(Threads kind, int64_t threads);

// How many threads are worth a region, where the work takes one of them so long.
inline int64_t threads_worth(Threads kind, double nanoseconds) {
  const int64_t threads = num_threads();
  const double worth = nanoseconds / region_nanoseconds(kind, threads);
  return std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(worth)));
}

constexpr int64_t kExpCost = 16;  // bytes that could be moved in the time of one exponential

// Into how many parts `count` items are split: as many as there are threads, or fewer where each
// item's `cost` (in bytes or operations) adds up to too little for a thread to be worth waking, or
// starting.
inline int64_t parts_worth(Threads kind, int64_t count, int64_t cost) {
  constexpr double kNanoseconds = 0.05;  // of one of them
  const double all = static_cast<double>(count) * static_cast<double>(cost) * kNanoseconds;
  return std::max<int64_t>(1, std::min(count, threads_worth(kind, all)));
}

// f(begin, end) over [0, count) in so many even parts.
template <class F>
void run_range(Threads threads, int64_t count, int64_t cost, const F& f) {
  const int64_t parts = parts_worth(threads, count, cost);
  run_tasks(threads, parts,
            [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
}

template <class F>
void run_range(int64_t count, int64_t cost, const F& f) {
  run_range(Threads::kPool, count, cost, f);
}

// run(context, 0, 1) in the calling thread, which leads a team of the pool's threads meanwhile.
void lead_team(TaskRange run, const void* context);

// f(), in the calling thread, whose parallel regions are steps of one team where the work, which
// takes so long on one thread, is worth it. f calls no operator of torch that has much to do: that
// would find itself within a parallel region, and be alone.
template <class F>
void with_team(double nanoseconds, const F& f) {
  if (led_team() != nullptr || threads_worth(Threads::kPool, nanoseconds) < 2) return f();
  const auto call = [](const void* context, int64_t, int64_t) {
    (*static_cast<const F*>(context))();
  };
  lead_team(call, &f);
}

}  // namespace dynquant
