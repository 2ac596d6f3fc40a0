// The threads of one parallel region, which share many short pieces of work one after the other.
//
// A parallel region takes a few microseconds where the pool's threads still spin, and fifty where
// they sleep in between. An op that consists of dozens of short steps opens one region for all of
// them: its threads watch for the next step, and meet in a fraction of a microsecond.
//
// No thread is counted on: steps are done by the threads that are there, be it the leader alone.
#pragma once

#include <stdint.h>

#include <atomic>
#include <exception>

namespace dynquant {

// run(context, begin, end) over a range of tasks.
using TaskRange = void (*)(const void* context, int64_t begin, int64_t end);

class Team {
 public:
  Team() = default;
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Called by the leader, outside of tasks: all of [0, tasks) is done on return. The first
  // exception is thrown again.
  void run(int64_t tasks, TaskRange run, const void* context);

  // Called by the others: works on what the leader gives out, until it has ended.
  void take_part();

  // The calling thread leads while this lives; at its end the others are let go.
  class Lead {
   public:
    explicit Lead(Team& team);
    ~Lead();
    Lead(const Lead&) = delete;
    Lead& operator=(const Lead&) = delete;

   private:
    Team& team_;
  };

 private:
  // What is given out: the number of the step, of the first part that nobody has taken, and of
  // parts. In one word, so that a thread that comes late cannot take a part of another step than
  // that which it saw.
  using Ticket = uint64_t;
  static constexpr int kStepShift = 32, kNextShift = 16;
  static constexpr Ticket kMostParts = 0xffff, kEnded = ~Ticket{0};
  static Ticket next(Ticket ticket) { return ticket >> kNextShift & kMostParts; }
  static Ticket count(Ticket ticket) { return ticket & kMostParts; }

  bool take_one();
  void run_part(int64_t part);

  // Of the step; written by the leader while no part is taken.
  TaskRange run_ = nullptr;
  const void* context_ = nullptr;
  int64_t tasks_ = 0, parts_ = 0;
  std::exception_ptr failure_;
  // In cache lines of their own.
  alignas(64) std::atomic<Ticket> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> has_failed_{false};
};

// The team that the calling thread leads; null where it leads none, and within tasks.
Team* led_team();

}  // namespace dynquant
