// The gates of recurrent layers, written once over an `Isa` type. Every sum and product is rounded
// on its own, in the order written here.
#pragma once

#include "activate.inl.h"
#include "kernels.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

// The sum of both products at one gate.
template <class Isa, class Part>
inline typename Isa::Float gate(const GatesArgs& a, int64_t i, Part part) {
  return Isa::add_float(part.load(a.input + i), part.load(a.hidden + i));
}

// c' = f * c + i * g, h' = o * tanh(c').
template <class Isa>
inline void lstm_gates(const GatesArgs& a) {
  each_registers<Isa>(a.n, [&a](int64_t i, auto isa, auto part) {
    using I = decltype(isa);
    const auto in = sigmoid<I>(gate<I>(a, i, part));
    const auto forget = sigmoid<I>(gate<I>(a, a.n + i, part));
    const auto added = tanh<I>(gate<I>(a, 2 * a.n + i, part));
    const auto out = sigmoid<I>(gate<I>(a, 3 * a.n + i, part));
    const auto c = I::add_float(I::mul(forget, part.load(a.c + i)), I::mul(in, added));
    part.store(a.c + i, c);
    part.store(a.h + i, I::mul(out, tanh<I>(c)));
  });
}

// n = tanh(input_n + r * hidden_n), h' = (h - n) * z + n.
template <class Isa>
inline void gru_gates(const GatesArgs& a) {
  each_registers<Isa>(a.n, [&a](int64_t i, auto isa, auto part) {
    using I = decltype(isa);
    const auto reset = sigmoid<I>(gate<I>(a, i, part));
    const auto update = sigmoid<I>(gate<I>(a, a.n + i, part));
    const auto hidden = I::mul(reset, part.load(a.hidden + 2 * a.n + i));
    const auto added = tanh<I>(I::add_float(part.load(a.input + 2 * a.n + i), hidden));
    const auto kept = I::mul(I::sub_float(part.load(a.h + i), added), update);
    part.store(a.h + i, I::add_float(kept, added));
  });
}

template <class Isa>
inline void rnn_gates(const GatesArgs& a) {
  each_registers<Isa>(a.n, [&a](int64_t i, auto isa, auto part) {
    using I = decltype(isa);
    const auto sum = gate<I>(a, i, part);
    // max gives its second operand where that is NaN.
    part.store(a.h + i, a.cell == Cell::rnn_tanh ? tanh<I>(sum) : I::max(I::set(0.0f), sum));
  });
}

template <class Isa>
void gates(const GatesArgs& a) {
  switch (a.cell) {
    case Cell::lstm:
      return lstm_gates<Isa>(a);
    case Cell::gru:
      return gru_gates<Isa>(a);
    case Cell::rnn_tanh:
    case Cell::rnn_relu:
      return rnn_gates<Isa>(a);
  }
}

}  // namespace
}  // namespace dynquant
