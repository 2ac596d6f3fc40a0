// Timings of raw kernels on one thread, for the benchmarks.
#pragma once

#include <stdint.h>

#include "../cpu/kernels.h"

namespace dynquant {

// Multiply-adds a second of the set's product on registers alone.
double peak_rate(const Kernels& kernels, double seconds);

// Bytes a second of reading a buffer of that size again and again.
double read_rate(const Kernels& kernels, int64_t bytes, double seconds);

// Seconds for one quantization and product of M rows, fp32 in and out, with a bias.
double linear_seconds(const Kernels& kernels, int64_t m, int64_t n, int64_t k, double seconds);

}  // namespace dynquant
