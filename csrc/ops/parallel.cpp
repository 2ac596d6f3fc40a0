#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <exception>
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

}  // namespace

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

}  // namespace dynquant
