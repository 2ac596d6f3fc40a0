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
  using Float = typename Isa::Float;
  each_register<Isa>(a.n, [&a](int64_t i, auto part) {
    const Float in = sigmoid<Isa>(gate<Isa>(a, i, part));
    const Float forget = sigmoid<Isa>(gate<Isa>(a, a.n + i, part));
    const Float added = tanh<Isa>(gate<Isa>(a, 2 * a.n + i, part));
    const Float out = sigmoid<Isa>(gate<Isa>(a, 3 * a.n + i, part));
    const Float c = Isa::add_float(Isa::mul(forget, part.load(a.c + i)), Isa::mul(in, added));
    part.store(a.c + i, c);
    part.store(a.h + i, Isa::mul(out, tanh<Isa>(c)));
  });
}

// n = tanh(input_n + r * hidden_n), h' = (h - n) * z + n.
template <class Isa>
inline void gru_gates(const GatesArgs& a) {
  using Float = typename Isa::Float;
  each_register<Isa>(a.n, [&a](int64_t i, auto part) {
    const Float reset = sigmoid<Isa>(gate<Isa>(a, i, part));
    const Float update = sigmoid<Isa>(gate<Isa>(a, a.n + i, part));
    const Float hidden = Isa::mul(reset, part.load(a.hidden + 2 * a.n + i));
    const Float added = tanh<Isa>(Isa::add_float(part.load(a.input + 2 * a.n + i), hidden));
    const Float kept = Isa::mul(Isa::sub_float(part.load(a.h + i), added), update);
    part.store(a.h + i, Isa::add_float(kept, added));
  });
}

template <class Isa>
inline void rnn_gates(const GatesArgs& a) {
  each_register<Isa>(a.n, [&a](int64_t i, auto part) {
    const typename Isa::Float sum = gate<Isa>(a, i, part);
    // max gives its second operand where that is NaN.
    part.store(a.h + i, a.cell == Cell::rnn_tanh ? tanh<Isa>(sum) : Isa::max(Isa::set(0.0f), sum));
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
