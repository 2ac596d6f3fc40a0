#include "team.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace dynquant {
namespace {

thread_local Team* led = nullptr;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where there are fewer cores than threads, that which is waited for may need this one's.
class Wait {
 public:
  void once() {
    if (++times_ < kTimesAwake) return pause();
    std::this_thread::yield();
  }
  void begin_again() { times_ = 0; }

 private:
  static constexpr int kTimesAwake = 1000;  // 10 to 50 microseconds
  int times_ = 0;
};

}  // namespace

Team* led_team() { return led; }

Team::Lead::Lead(Team& team) : team_(team) { led = &team; }

Team::Lead::~Lead() {
  led = nullptr;
  team_.ticket_.store(kEnded, std::memory_order_release);
}

void Team::run(int64_t tasks, TaskRange run, const void* context) {
  run_ = run;
  context_ = context;
  tasks_ = tasks;
  parts_ = std::min(tasks, static_cast<int64_t>(kMostParts));
  done_.store(0, std::memory_order_relaxed);
  const Ticket step = (ticket_.load(std::memory_order_relaxed) >> kStepShift) + 1;
  ticket_.store(step << kStepShift | static_cast<Ticket>(parts_), std::memory_order_release);
  led = nullptr;
  while (take_one()) {
  }
  for (Wait wait; done_.load(std::memory_order_acquire) != parts_;) wait.once();
  led = this;
  if (!has_failed_.load(std::memory_order_relaxed)) return;
  has_failed_.store(false, std::memory_order_relaxed);
  std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Team::take_part() {
  for (Wait wait; ticket_.load(std::memory_order_relaxed) != kEnded;) {
    if (take_one()) {
      wait.begin_again();
    } else {
      wait.once();
    }
  }
}

// Takes one part of the present step, where one is left.
bool Team::take_one() {
  Ticket ticket = ticket_.load(std::memory_order_acquire);
  while (next(ticket) < count(ticket)) {
    if (ticket_.compare_exchange_weak(ticket, ticket + (Ticket{1} << kNextShift),
                                      std::memory_order_acq_rel, std::memory_order_acquire)) {
      run_part(static_cast<int64_t>(next(ticket)));
      return true;
    }
  }
  return false;
}

void Team::run_part(int64_t part) {
  try {
    run_(context_, tasks_ * part / parts_, tasks_ * (part + 1) / parts_);
  } catch (...) {
    if (!has_failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
  }
  done_.fetch_add(1, std::memory_order_release);
}

}  // namespace dynquant
