// A Gpu (csrc/cuda/gpu.h) and a Stream (calls.inl.h) on the host: what runs are the kernels
// themselves, each thread of a block a coroutine.
//
// Threads run one after the other, each as far as it can, in an order that changes from block to
// block: a thread that needs another's work without a barrier between them finds it not done. An
// asynchronous copy destroys its target when it starts and writes it when it is waited for, the
// earliest and the latest moment that the hardware may choose: who reads too early, or writes
// where another still reads, gets garbage. What must be aligned is checked, and accesses of shared
// memory that meet in a bank are counted.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../../csrc/cpu/convert.h"
#include "../../csrc/cuda/gpu.h"

namespace dynquant {

// One block of threads, and the machinery that all blocks use in turn.
class EmulatedBlock {
 public:
  static EmulatedBlock& current() {
    static EmulatedBlock block;
    return block;
  }

  // Runs `body` in every thread of every block.
  void run(const Grid& grid, int threads, int shared_bytes, const std::function<void()>& body) {
    body_ = &body;
    grid_ = grid;
    for (block_y_ = 0; block_y_ < grid.y; ++block_y_) {
      for (block_x_ = 0; block_x_ < grid.x; ++block_x_) run_block(threads, shared_bytes);
    }
  }

  void sync() {
    ++at_barrier_;
    self().waits = true;
    yield();
  }

  // Calls `act` with the operands of all 32 lanes once the last of them is here.
  template <class Operands>
  void together(Operands* operands, const std::function<void(Operands* const*)>& act) {
    const int first = thread_ / 32 * 32;
    self().operands = operands;
    self().waits = true;
    int here = 0;
    for (int lane = 0; lane < 32; ++lane) here += threads_[first + lane].operands != nullptr;
    if (here < 32) return yield();
    Operands* all[32];
    for (int lane = 0; lane < 32; ++lane) {
      all[lane] = static_cast<Operands*>(threads_[first + lane].operands);
      threads_[first + lane].operands = nullptr;
      threads_[first + lane].waits = false;
    }
    act(all);
  }

  struct Copy {
    uint8_t* to;
    const void* from;  // null: zeros
  };
  void copy(uint8_t* to, const void* from) {
    require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "copy_async to an unaligned address");
    require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "copy_async from an unaligned address");
    std::memset(to, 0xAD, 16);
    self().open.push_back({to, from});
  }
  void commit() {
    self().groups.push_back(std::move(self().open));
    self().open.clear();
  }
  void wait(size_t but) {
    auto& groups = self().groups;
    while (groups.size() > but) {
      for (const Copy& c : groups.front()) {
        if (c.from == nullptr) {
          std::memset(c.to, 0, 16);
        } else {
          std::memcpy(c.to, c.from, 16);
        }
      }
      groups.erase(groups.begin());
    }
  }

  // Counts the accesses of shared memory, 16 bytes by each of eight neighbouring lanes at a time.
  void count_banks(const void* const* lanes) {
    for (int first = 0; first < 32; first += 8) {
      std::vector<uintptr_t> banks;
      for (int lane = first; lane < first + 8; ++lane) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(lanes[lane]);
        require(at % 16 == 0, "16 bytes of shared memory at an unaligned address");
        banks.push_back(at / 16 % 8);
      }
      std::sort(banks.begin(), banks.end());
      conflicts += static_cast<long>(banks.end() - std::unique(banks.begin(), banks.end()));
    }
  }

  static void require(bool holds, const char* what) {
    if (holds) return;
    std::printf("emulated GPU: %s\n", what);
    std::exit(1);
  }

  int thread() const { return thread_; }
  int64_t block_x() const { return block_x_; }
  int block_y() const { return block_y_; }
  const Grid& grid() const { return grid_; }
  uint8_t* shared() { return shared_; }

  long conflicts = 0;

 private:
  static constexpr size_t kStack = 64 * 1024;

  struct Thread {
    ucontext_t start;
    void* resume[5];
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool started = false, waits = false, done = false;
    void* operands = nullptr;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
  };

  Thread& self() { return threads_[static_cast<size_t>(thread_)]; }
  // Once a thread has its stack, jumps do: switching contexts asks the kernel for a signal mask.
  // The compiler's own jumps, since the C library's ask a sanitizer to look at the whole stack.
  __attribute__((noinline, no_sanitize("address"))) void yield() {
    if (__builtin_setjmp(self().resume) == 0) jump(scheduler_);
  }
  __attribute__((noinline, no_sanitize("address"))) void resume() {
    if (__builtin_setjmp(scheduler_) != 0) return;
    if (self().started) jump(self().resume);
    self().started = true;
    setcontext(&self().start);
  }
  __attribute__((noinline, no_sanitize("address"))) static void jump(void** to) {
    __builtin_longjmp(to, 1);
  }

  static void start() {
    EmulatedBlock& block = current();
    (*block.body_)();
    block.self().done = true;
    block.yield();
  }

  void run_block(int threads, int shared_bytes) {
    if (threads_.size() < static_cast<size_t>(threads)) {
      threads_.resize(static_cast<size_t>(threads));
    }
    // At its exact size, so that a sanitizer sees what goes beyond it.
    shared_ = static_cast<uint8_t*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    std::memset(shared_, 0xAD, static_cast<size_t>(shared_bytes));
    for (int t = 0; t < threads; ++t) {
      Thread& thread = threads_[static_cast<size_t>(t)];
      thread.started = thread.waits = thread.done = false;
      thread.operands = nullptr;
      thread.open.clear();
      thread.groups.clear();
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.get();
      thread.start.uc_stack.ss_size = kStack;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, &EmulatedBlock::start, 0);
    }
    at_barrier_ = 0;
    // An odd step visits all threads, their number being a power of two times 32.
    const int step = order_ % 3 == 0 ? 1 : order_ % 3 == 1 ? threads - 1 : 2 * (order_ % 16) + 1;
    ++order_;
    for (int done = 0; done < threads;) {
      bool progress = false;
      done = 0;
      for (int i = 0; i < threads; ++i) {
        thread_ = (i * step + step) % threads;
        if (!self().done && !self().waits) {
          resume();
          progress = true;
        }
        done += self().done;
      }
      if (at_barrier_ > 0 && at_barrier_ + done == threads) {
        // A thread that has returned counts as arrived, as it does on the hardware.
        at_barrier_ = 0;
        for (int t = 0; t < threads; ++t) threads_[static_cast<size_t>(t)].waits = false;
        progress = true;
      }
      require(progress || done == threads, "threads wait for each other");
    }
    std::free(shared_);
  }

  const std::function<void()>* body_ = nullptr;
  Grid grid_ = {0, 0};
  int64_t block_x_ = 0;
  int block_y_ = 0, thread_ = 0, at_barrier_ = 0, order_ = 0;
  uint8_t* shared_ = nullptr;
  std::vector<Thread> threads_;
  void* scheduler_[5];
};

// kAsync says whether copies are asynchronous, as they are from sm_80 on.
template <bool kAsync>
struct EmulatedGpu {
  static EmulatedBlock& block() { return EmulatedBlock::current(); }
  static int thread() { return block().thread(); }
  static int64_t block_x() { return block().block_x(); }
  static int block_y() { return block().block_y(); }
  static int64_t grid_x() { return block().grid().x; }
  static int grid_y() { return block().grid().y; }
  static uint8_t* shared() { return block().shared(); }
  static void sync() { block().sync(); }

  template <class T>
  static T shuffle_xor(T value, int mask) {
    struct Operands {
      T value, result;
      int lane;
    } mine = {value, value, thread() % 32};
    block().together<Operands>(&mine, [mask](Operands* const* all) {
      for (int lane = 0; lane < 32; ++lane) all[lane]->result = all[lane ^ mask]->value;
    });
    return mine.result;
  }

  static constexpr bool kAsyncCopies = kAsync;
  static void copy_async(void* to, const void* from, bool real) {
    uint8_t* bytes = static_cast<uint8_t*>(to);
    block().copy(bytes, real ? from : nullptr);
    if (!kAsync) {
      block().commit();
      block().wait(0);
    }
  }
  static void commit() {
    if (kAsync) block().commit();
  }
  template <int N>
  static void wait() {
    if (kAsync) block().wait(N);
  }

  static Bytes16 load16(const void* from) {
    EmulatedBlock::require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "unaligned load16");
    Bytes16 bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
  }
  static void store16(void* to, const Bytes16& bytes) {
    EmulatedBlock::require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "unaligned store16");
    std::memcpy(to, &bytes, sizeof bytes);
  }
  static Bytes16 load_shared16(const void* from) {
    const void* address = from;
    block().together<const void*>(&address, [](const void** const* all) {
      const void* lanes[32];
      for (int lane = 0; lane < 32; ++lane) lanes[lane] = *all[lane];
      block().count_banks(lanes);
    });
    return load16(from);
  }

  static void load_fragment(const void* row, uint32_t (&registers)[4]) {
    struct Operands {
      const void* row;
      uint32_t* registers;
    } mine = {row, registers};
    block().together<Operands>(&mine, [](Operands* const* all) {
      const void* rows[32];
      for (int lane = 0; lane < 32; ++lane) rows[lane] = all[lane]->row;
      block().count_banks(rows);
      for (int lane = 0; lane < 32; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          const uint8_t* bytes = static_cast<const uint8_t*>(rows[8 * matrix + lane / 4]);
          std::memcpy(&all[lane]->registers[matrix], bytes + lane % 4 * 4, 4);
        }
      }
    });
  }

  // As the manual of PTX gives the fragments of mma.m16n8k32 with 8-bit operands.
  static void mma(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
      int32_t* sums;
      const uint32_t* a;
      uint32_t b[2];
    } mine = {sums, a, {b0, b1}};
    block().together<Operands>(&mine, [](Operands* const* all) {
      uint8_t left[16][32];
      int8_t right[32][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane >> 2, within = lane % 4;
        for (int i = 0; i < 16; ++i) {
          const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
          const int column = within * 4 + (i & 3) + (i < 8 ? 0 : 16);
          left[row][column] = static_cast<uint8_t>(all[lane]->a[i / 4] >> (8 * (i & 3)));
        }
        for (int i = 0; i < 8; ++i) {
          const int row = within * 4 + (i & 3) + (i < 4 ? 0 : 16);
          right[row][group] = static_cast<int8_t>(all[lane]->b[i / 4] >> (8 * (i & 3)));
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8;
          const int column = lane % 4 * 2 + (i & 1);
          uint32_t sum = static_cast<uint32_t>(all[lane]->sums[i]);
          for (int k = 0; k < 32; ++k) {
            sum += static_cast<uint32_t>(left[row][k] * right[k][column]);
          }
          all[lane]->sums[i] = static_cast<int32_t>(sum);
        }
      }
    });
  }

  static int32_t dot(uint32_t u, uint32_t s, int32_t sum) {
    uint32_t result = static_cast<uint32_t>(sum);
    for (int i = 0; i < 4; ++i) {
      const int left = static_cast<uint8_t>(u >> (8 * i));
      result += static_cast<uint32_t>(left * static_cast<int8_t>(s >> (8 * i)));
    }
    return static_cast<int32_t>(result);
  }

  static float mul(float a, float b) { return a * b; }
  static float add(float a, float b) { return a + b; }
  static float div(float a, float b) { return a / b; }
  static float to_float(int32_t a) { return static_cast<float>(a); }
  static int32_t round_to_int(float a) { return static_cast<int32_t>(std::lrintf(a)); }
  template <class T>
  static float widen(T x) {
    return dynquant::widen(x);
  }
  template <class T>
  static void narrow(float x, T* out) {
    dynquant::narrow(x, out);
  }
};

template <bool kAsync>
struct EmulatedStream {
  template <class Kernel>
  void launch(const Grid& grid, int shared_bytes, const typename Kernel::Args& args) const {
    EmulatedBlock::current().run(grid, Kernel::kThreads, shared_bytes,
                                 [&args] { Kernel::template run<EmulatedGpu<kAsync>>(args); });
  }
  int64_t processors() const { return 4; }
  bool async_copies() const { return kAsync; }
};

}  // namespace dynquant
