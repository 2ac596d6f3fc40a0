// The kernel table of one instruction set, from its `Isa` type.
#pragma once

#include "embedding.inl.h"
#include "gates.inl.h"
#include "gemm.inl.h"
#include "half.inl.h"
#include "probe.inl.h"
#include "quantize.inl.h"

namespace dynquant {
namespace {

template <class Isa>
constexpr Kernels table_of(const char* name) {
  return {name,
          Isa::kGroupBytes,
          &range<Isa>,
          &quantize<Isa, Multiply>,
          &quantize_staged<Isa>,
          &quantize<Isa, Divide>,
          &stage<Isa>,
          &gemm<Isa>,
          &rescale<Isa>,
          &half_gemm<Isa>,
          &widen_row<Isa>,
          &quantize_row<Isa>,
          &bags<Isa>,
          &activate<Isa>,
          &gates<Isa>,
          &peak<Isa>,
          &read<Isa>};
}

}  // namespace
}  // namespace dynquant
