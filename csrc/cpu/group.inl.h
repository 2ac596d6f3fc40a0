// Four k of a tile of staged rows and columns of a panel: what every way through a weight is made
// of.
#pragma once

#include "epilogue.inl.h"
#include "excess.inl.h"
#include "kernels.h"
#include "layout.h"

namespace dynquant {
namespace {

// Registers that a tile of R rows by V registers of columns works with. The operand of which there
// are fewer registers stays in them, the other streams past.
template <class Isa>
constexpr int tile_registers(int rows, int vectors) {
  const int kept = !Isa::kKeepsWeights ? 0 : rows < vectors ? rows : vectors;
  return rows * vectors + kept + 1 + Isa::kTemporaries;
}

// Registers of columns for a tile of `rows`: as many as the registers and the panel allow, a power
// of two so that tiles fill a panel.
template <class Isa>
constexpr int tile_vectors(int rows) {
  int vectors = static_cast<int>(kPanelColumns) / Isa::kLanes;
  while (vectors > 1 && tile_registers<Isa>(rows, vectors) > Isa::kRegisters) vectors /= 2;
  return vectors;
}

template <class Isa, int R>
inline typename Isa::Weights weights_of(const int8_t* p) {
  const typename Isa::Weights w = Isa::load_weights(p);
  // Else the compiler may load them once for each row: loads would then be the limit.
  return R > 1 && Isa::kKeepsWeights ? Isa::keep(w) : w;
}

// Four k of the whole tile.
template <class Isa, int R, int V>
inline void multiply_group(const uint8_t* staged, int64_t staged_stride, const int8_t* weights,
                           typename Isa::Int (&acc)[R][V]) {
  constexpr int kBytes = Isa::kLanes * static_cast<int>(kGroup);
  if constexpr (R < V && Isa::kKeepsWeights) {
    typename Isa::Activation a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = Isa::load_activation(staged + r * staged_stride);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const typename Isa::Weights w = weights_of<Isa, R>(weights + v * kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][v] = Isa::dot(acc[r][v], a[r], w);
    }
  } else {
    typename Isa::Weights w[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) w[v] = weights_of<Isa, R>(weights + v * kBytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Isa::Activation a = Isa::load_activation(staged + r * staged_stride);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Isa::dot(acc[r][v], a, w[v]);
    }
  }
}

template <class Isa, int R, int V>
inline void clear(typename Isa::Int (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = Isa::set_int(0);
  }
}

// What sets whose staged bytes have an offset have too much; `end` is where the rows' groups end.
template <class Isa, int R, int V>
inline void take_excess(const uint8_t* end, int64_t staged_stride, typename Isa::Int (&acc)[R][V]) {
  if constexpr (Isa::kOffset != 0) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Isa::Int excess = Isa::set_int(excess_at(end + r * staged_stride));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = Isa::sub(acc[r][v], excess);
    }
  }
}

}  // namespace
}  // namespace dynquant
