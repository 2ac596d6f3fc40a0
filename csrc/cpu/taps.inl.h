// A convolution of each channel on its own, of one position, written once over an `Isa` type: a sum
// that begins at the bias, or 0, and takes in tap after tap by one fused multiply-add each.
#pragma once

#include "kernels.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

template <class Isa>
void taps(const TapsArgs& a) {
  each_registers<Isa>(a.n, [&](int64_t i, auto isa, auto part) {
    auto sum = a.bias == nullptr ? isa.set(0.0f) : part.load(a.bias + i);
    for (int64_t tap = 0; tap < a.taps; ++tap) {
      sum = isa.mul_add(part.load(a.weight + tap * a.n + i), part.load(a.x[tap] + i), sum);
    }
    part.store(a.y + i, sum);
  });
}

}  // namespace
}  // namespace dynquant
