// What a machine could give at best, for the benchmarks to hold the kernels against: the product's
// instructions on registers alone, and reading memory as fast as one core can.
#pragma once

#include "gemm.inl.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

// Sums of a whole tile, `steps` times over, without touching memory. Returns the multiply-adds
// done.
template <class Isa>
int64_t peak(int64_t steps) {
  constexpr int kSums = Isa::kTileRows * tile_vectors<Isa>(Isa::kTileRows);
  alignas(64) static const int8_t zeros[Isa::kLanes * kGroup] = {};
  const int8_t* bytes = zeros;
  asm volatile("" : "+r"(bytes));  // else the compiler would know the operands
  typename Isa::Weights w = Isa::load_weights(bytes);
  const typename Isa::Activation a = Isa::load_activation(reinterpret_cast<const uint8_t*>(bytes));
  typename Isa::Int acc[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) acc[i] = Isa::set_int(i);  // equal ones would be merged
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      w = Isa::keep(w);  // else the compiler would see that every product is the same
      acc[i] = Isa::dot(acc[i], a, w);
    }
  }
  typename Isa::Int sum = acc[0];
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) sum = Isa::add(sum, acc[i]);
  int32_t sums[Isa::kLanes];
  Isa::store_int(sums, sum);
  asm volatile("" : : "m"(sums));  // the sums are wanted
  return steps * kSums * Isa::kLanes * kGroup;
}

// Reads whole registers of `bytes` bytes and returns something that depends on all of them.
template <class Isa>
int32_t read(const void* data, int64_t bytes) {
  constexpr int64_t kStep = Isa::kLanes;
  const int32_t* p = static_cast<const int32_t*>(data);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(int32_t));
  typename Isa::Int a = Isa::set_int(0), b = a, c = a, d = a;
  for (int64_t i = 0; i + 4 * kStep <= count; i += 4 * kStep) {
    a = Isa::add(a, Isa::load_int(p + i));
    b = Isa::add(b, Isa::load_int(p + i + kStep));
    c = Isa::add(c, Isa::load_int(p + i + 2 * kStep));
    d = Isa::add(d, Isa::load_int(p + i + 3 * kStep));
  }
  int32_t sums[Isa::kLanes];
  Isa::store_int(sums, Isa::add(Isa::add(a, b), Isa::add(c, d)));
  return sums[0];
}

}  // namespace
}  // namespace dynquant
