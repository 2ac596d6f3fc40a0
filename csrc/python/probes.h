// Timings of raw kernels on one thread, for the benchmarks.
#pragma once

#include <stdint.h>

#include <cstddef>
#include <vector>

#include "../cpu/kernels.h"

namespace dynquant {

// Memory that starts where a cache line does.
struct Aligned {
  std::vector<uint8_t> memory;
  uint8_t* data;
  explicit Aligned(int64_t bytes) : memory(static_cast<std::size_t>(bytes) + 64, 1) {
    data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  }
};

// Multiply-adds a second of the set's product on registers alone.
double peak_rate(const Kernels& kernels, double seconds);

// Bytes a second of reading a buffer of that size again and again.
double read_rate(const Kernels& kernels, int64_t bytes, double seconds);

// Seconds for one quantization and product of M rows, fp32 in and out, with a bias.
double linear_seconds(const Kernels& kernels, int64_t m, int64_t n, int64_t k, double seconds);

}  // namespace dynquant
