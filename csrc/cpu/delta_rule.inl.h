// The gated delta rule of linear attention, written once over an `Isa` type, for columns of the
// state S[dim, columns] of one head, which do not know of each other. For each token
//
//     keep = factor_of(decay)                         its exponential
//     read = sum over i of key[i] * S[i]              of the state before the token
//     added = beta * (value - keep * read)
//     S[i] = keep * S[i] + key[i] * added             rounded after the first product
//     out = scale * (sum over i of query[i] * S[i])
//
// where each sum begins at 0 and takes in i = 0, 1, ... by one fused multiply-add each, as does the
// new state. So the bits are the same on every instruction set, and for any split of columns and
// tokens.
//
// What a token writes the next one reads, so that one pass over the state does for both: its
// columns stay in the L1 cache, and in registers what is summed.
#pragma once

#include "activate.inl.h"
#include "kernels.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

// Registers of columns side by side: as many as keep the units busy while sums wait for themselves,
// and as 16 registers have room for.
constexpr int kDeltaRegisters = 2;

// The sum of key[i] * S[i].
template <class Isa, class Part>
inline typename Isa::Float read_state(const DeltaRuleArgs& a, int64_t column, Part part) {
  typename Isa::Float sum = Isa::set(0.0f);
  for (int64_t i = 0; i < a.dim; ++i) {
    const auto s = part.load(a.from + i * a.from_stride + column);
    sum = Isa::mul_add(Isa::set(a.key[i]), s, sum);
  }
  return sum;
}

// One token: the state after it, from `from`, and what comes out. Gives what the next token, with
// its key, reads of the new state; with no key, 0.
template <class Isa, bool IsLast, class Part>
inline typename Isa::Float delta_step(const DeltaRuleArgs& a, int64_t token, const float* from,
                                      int64_t from_stride, int64_t column, typename Isa::Float read,
                                      Part part) {
  using Float = typename Isa::Float;
  const float* key = a.key + token * a.vector_stride;
  const float* query = a.query + token * a.vector_stride;
  const float* next = key + a.vector_stride;
  const Float keep = factor_of<Isa>(Isa::set(a.decay[token]));
  const Float value = part.load(a.value + token * a.value_stride + column);
  const Float beta = Isa::set(a.beta[token]);
  const Float added = Isa::mul(beta, Isa::sub_float(value, Isa::mul(keep, read)));
  Float out = Isa::set(0.0f), read_next = Isa::set(0.0f);
#pragma GCC unroll 2
  for (int64_t i = 0; i < a.dim; ++i) {
    const Float kept = Isa::mul(keep, part.load(from + i * from_stride + column));
    const Float s = Isa::mul_add(Isa::set(key[i]), added, kept);
    part.store(a.state + i * a.state_stride + column, s);
    out = Isa::mul_add(Isa::set(query[i]), s, out);
    if constexpr (!IsLast) read_next = Isa::mul_add(Isa::set(next[i]), s, read_next);
  }
  part.store(a.out + token * a.out_stride + column, Isa::mul(Isa::set(a.scale), out));
  return read_next;
}

template <class Isa>
void delta_rule(const DeltaRuleArgs& a) {
  if (a.tokens == 0) return;
  each_registers<Isa, kDeltaRegisters>(a.columns, [&](int64_t column, auto isa, auto part) {
    using Many = decltype(isa);
    auto read = read_state<Many>(a, column, part);
    const float* from = a.from;
    int64_t from_stride = a.from_stride, token = 0;
    for (; token + 1 < a.tokens; ++token) {
      read = delta_step<Many, false>(a, token, from, from_stride, column, read, part);
      from = a.state, from_stride = a.state_stride;
    }
    delta_step<Many, true>(a, token, from, from_stride, column, read, part);
  });
}

}  // namespace
}  // namespace dynquant
