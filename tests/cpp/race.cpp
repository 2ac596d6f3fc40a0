// A data race, by which tests see that the thread sanitizer is at work. `count` is called by
// several threads at once.
namespace {
int counter = 0;
}

extern "C" __attribute__((visibility("default"))) int count(int times) {
  for (int i = 0; i < times; ++i) {
    ++counter;
    asm volatile("" ::: "memory");  // each time in memory
  }
  return counter;
}
