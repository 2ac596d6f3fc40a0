// A team's steps: every task is done once, by whichever threads are there; exceptions arrive; and
// nothing of a step is read by one that comes late. Without torch, so that the thread sanitizer
// sees all of it. A wrong result ends it with 1.
#include "../../csrc/ops/team.h"

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using dynquant::Team;

int failures = 0;

void expect(bool holds, const char* what, int64_t threads, int64_t tasks) {
  if (holds) return;
  ++failures;
  std::printf("team_test: %s, %d threads, %d tasks\n", what, static_cast<int>(threads),
              static_cast<int>(tasks));
}

// What the tasks of one step write to: not atomic, since each has its own place.
struct Step {
  std::vector<int> done;
  int64_t throws_at = -1;
  std::atomic<bool> nested{false};

  static void run(const void* context, int64_t begin, int64_t end) {
    Step& step = *static_cast<Step*>(const_cast<void*>(context));
    if (dynquant::led_team() != nullptr) step.nested = true;
    for (int64_t task = begin; task < end; ++task) {
      if (task == step.throws_at) throw std::runtime_error("of a task");
      ++step.done[static_cast<size_t>(task)];
    }
  }
};

void run_step(Team& team, int64_t threads, int64_t tasks) {
  Step step{std::vector<int>(static_cast<size_t>(tasks), 0)};
  team.run(tasks, Step::run, &step);
  bool once = true;
  for (int done : step.done) once = once && done == 1;
  expect(once, "a task was not done once", threads, tasks);
  expect(!step.nested, "a task finds a team that it could lead", threads, tasks);
  expect(dynquant::led_team() == &team, "the leader leads no more", threads, tasks);
}

void run_step_that_throws(Team& team, int64_t threads, int64_t tasks) {
  Step step{std::vector<int>(static_cast<size_t>(tasks), 0)};
  step.throws_at = tasks / 2;
  bool has_thrown = false;
  try {
    team.run(tasks, Step::run, &step);
  } catch (const std::runtime_error&) {
    has_thrown = true;
  }
  expect(has_thrown, "an exception was lost", threads, tasks);
}

void lead(Team& team, int64_t threads, int steps) {
  const Team::Lead leading(team);
  for (int step = 0; step < steps; ++step) {
    for (int64_t tasks : {1, 2, 3, 7, 64}) run_step(team, threads, tasks);
    if (step % 100 == 0) {
      run_step(team, threads, 70000);  // more than there are parts of a step
      run_step_that_throws(team, threads, 5);
    }
  }
}

void test(int64_t threads, int steps) {
  Team team;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&] { team.take_part(); });
  lead(team, threads, steps);
  for (std::thread& other : others) other.join();
  expect(dynquant::led_team() == nullptr, "the team lives on", threads, 0);
  team.take_part();  // one that comes after the end leaves at once
}

}  // namespace

int main() {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  for (int64_t threads : {1, 2, 3}) test(threads, 2000);
  test(4 * cores, 20);  // threads that wait for each other on one core
  std::printf("team_test: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
