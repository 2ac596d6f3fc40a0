// The kernel table of one instruction set, from its `Isa` type.
#pragma once

#include "attention.inl.h"
#include "delta_rule.inl.h"
#include "embedding.inl.h"
#include "gates.inl.h"
#include "gemm.inl.h"
#include "half.inl.h"
#include "norm.inl.h"
#include "probe.inl.h"
#include "quantize.inl.h"
#include "selective_scan.inl.h"
#include "strips.inl.h"
#include "taps.inl.h"
#include "weighted_sum.inl.h"

namespace dynquant {
namespace {

template <class Isa>
constexpr Product product_of() {
  Product p = {};
  p.row_multiple = 1;
  p.block_rows = 192;
  p.layout.group_bytes = Isa::kGroupBytes;
  p.layout.tile_rows = 1;
  p.costs = Isa::kCosts;
  p.quantize_staged = &quantize_staged<Isa>;
  p.stage = &stage<Isa>;
  p.gemm = &gemm<Isa>;
  return p;
}

template <class Isa>
constexpr Kernels table_of(const char* name) {
  Kernels t = {};
  t.name = name;
  t.product = product_of<Isa>();
  t.range = &range<Isa>;
  t.quantize = &quantize<Isa, Multiply>;
  t.quantize_divide = &quantize<Isa, Divide>;
  t.quantize_vectors = &quantize_vectors<Isa>;
  t.rescale = &rescale<Isa>;
  t.half_gemm = &half_gemm<Isa>;
  t.half_costs = Isa::kHalfCosts;
  t.widen = &widen_row<Isa>;
  t.narrow = &narrow_row<Isa>;
  t.quantize_row = &quantize_row<Isa>;
  t.bags = &bags<Isa>;
  t.activate = &activate<Isa>;
  t.gates = &gates<Isa>;
  t.delta_rule = &delta_rule<Isa>;
  t.selective_scan = &selective_scan<Isa>;
  t.taps = &taps<Isa>;
  t.norm = &norm<Isa>;
  t.softmax = &softmax<Isa>;
  t.rotary = &rotary<Isa>;
  t.scores = &scores<Isa>;
  t.divide = &divide<Isa>;
  t.weighted_sums = &weighted_sums<Isa>;
  t.lay_strips = &lay_strips<Isa>;
  t.order_rows = &order_rows<Isa>;
  t.strips_gemm = &strips_gemm<Isa>;
  t.ordered_from = kOrderedFrom<Isa>;
  t.strips_from_k = kStripsFromK<Isa>;
  t.finish_half = &finish_half_rows<Isa>;
  t.pack_transposed = &pack_transposed<Isa>;
  t.sum_columns = Isa::kOffset == 0 ? nullptr : &sum_columns<Isa>;
  t.peak = &peak<Isa>;
  t.read = &read<Isa>;
  return t;
}

}  // namespace
}  // namespace dynquant
