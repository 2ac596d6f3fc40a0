#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

namespace dynquant {
namespace {

std::atomic<bool> in_child{false};

// Only the thread that calls fork() lives on in the child: the others of torch's pool are gone, and
// the OpenMP library would wait for them forever.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { in_child.store(true, std::memory_order_relaxed); });

bool equals(const char* name, std::string_view wanted) {
  const char* value = std::getenv(name);
  if (value == nullptr || std::strlen(value) != wanted.size()) return false;
  return std::equal(wanted.begin(), wanted.end(), value, [](char a, char b) {
    return a == std::tolower(static_cast<unsigned char>(b));
  });
}

// As the OpenMP run-time libraries read it: once, from the environment.
bool threads_sleep() {
  static const bool sleep = equals("OMP_WAIT_POLICY", "passive") || equals("GOMP_SPINCOUNT", "0") ||
                            equals("KMP_BLOCKTIME", "0");
  return sleep;
}

}  // namespace

double region_nanoseconds(Threads kind, int64_t threads) {
  // What two threads take to meet where the pool's threads still spin, and one microsecond more, so
  // that no call is slower for it; where they were told to sleep between regions, and about as long
  // to start threads, as a forked child does; and in a team. torch wakes all of its threads,
  // whatever the number of parts.
  constexpr double kSpinning = 3e3, kSleeping = 50e3, kTeam = 500, kAnotherThread = 50;
  const double more = static_cast<double>(threads - 2) * kAnotherThread;
  if (kind == Threads::kPool && led_team() != nullptr) return kTeam + more;
  const bool wakes = kind == Threads::kOwn || is_forked_child() || threads_sleep();
  return (wakes ? kSleeping : kSpinning) + more;
}

bool is_forked_child() { return in_child.load(std::memory_order_relaxed); }

void on_own_threads(int64_t tasks, TaskRange run, const void* context) {
  const int64_t parts = std::max<int64_t>(1, std::min(tasks, num_threads()));
  std::vector<std::exception_ptr> failures(static_cast<size_t>(parts));
  const auto run_part = [&](int64_t part, int64_t end) {
    try {
      run(context, tasks * part / parts, tasks * end / parts);
    } catch (...) {
      failures[static_cast<size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(parts - 1));
  int64_t part = 0;
  try {
    for (; part < parts - 1; ++part) {
      threads.emplace_back([&run_part, part] { run_part(part, part + 1); });
    }
  } catch (const std::system_error&) {  // the system grants no more threads
  }
  run_part(part, parts);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

void lead_team(TaskRange run, const void* context) {
  Team team;
  const std::thread::id leader = std::this_thread::get_id();
  bool has_led = false;
  std::exception_ptr failure;
  run_tasks(num_threads(), [&](int64_t) {
    if (std::this_thread::get_id() != leader) return team.take_part();
    if (has_led) return;
    has_led = true;
    const Team::Lead lead(team);
    try {
      run(context, 0, 1);
    } catch (...) {  // torch would pass on its text alone
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace dynquant
