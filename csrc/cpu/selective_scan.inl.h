// The scan of a state space model, written once over an `Isa` type, for rows of its state S[rows,
// n], which do not know of each other. For each token and row
//
//     S[j] = factor_of(dt * rate[j]) * S[j] + (dt * x) * b[j]    rounded after the first product
//     out = sum over j of c[j] * S[j], + skip * x
//
// where the sum is 16 partial sums like those of half.inl.h, each of which begins at 0, with 0
// added at last, and products are added by one fused multiply-add each. So the bits are the same on
// every instruction set, and for any split of rows and tokens.
#pragma once

#include <algorithm>

#include "activate.inl.h"
#include "kernels.h"
#include "norm.inl.h"
#include "registers.inl.h"

namespace dynquant {
namespace {

// What was stored, with zeros in the lanes that are no part.
template <class Isa>
inline typename Isa::Float as_stored(typename Isa::Float x, const float*, WholeRegister<Isa>) {
  return x;
}
template <class Isa>
inline typename Isa::Float as_stored(typename Isa::Float, const float* at,
                                     PartOfRegister<Isa> part) {
  return part.load(at);
}

// Rows that go through a token together: each has a chain of sums of its own.
template <class Isa>
constexpr int kScanRows = Isa::kLanes < 4 ? Isa::kLanes : 4;

// One token of Rows rows: the new states, and for each row the register of which reduce_add gives
// what comes out. keep(row, i, part): the factors of the states from number i on.
template <class Isa, int Rows, class Keep>
inline void scan_rows(const SelectiveScanArgs& a, const float* added, const float* b,
                      const float* c, const float* from, float* state, const Keep& keep,
                      typename Isa::Float* out) {
  using Float = typename Isa::Float;
  constexpr int kParts = RowSum<Isa>::kParts;
  Float sums[Rows][kParts], every[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    every[r] = Isa::set(added[r]);
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) sums[r][p] = Isa::set(0.0f);
  }
  each_part<Isa>(a.n, [&](int p, int64_t i, auto part) {
    const Float in = part.load(b + i), of_out = part.load(c + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Float kept = Isa::mul(keep(r, i, part), part.load(from + r * a.n + i));
      const Float s = Isa::mul_add(every[r], in, kept);
      float* at = state + r * a.n + i;
      part.store(at, s);
      sums[r][p] = Isa::mul_add(of_out, as_stored<Isa>(s, at, part), sums[r][p]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) out[r] = sum_by_halves<Isa>(sums[r]);
}

template <class Isa>
void selective_scan(const SelectiveScanArgs& a) {
  using Float = typename Isa::Float;
  const float* from = a.from;
  for (int64_t t = 0; t < a.tokens; ++t, from = a.state) {
    const float *x = a.x + t * a.rows, *b = a.b + t * a.n, *c = a.c + t * a.n;
    const float* dt = a.dt + t * (a.shares_dt ? 1 : a.rows);
    const auto step = [&](int64_t row) { return a.shares_dt ? *dt : dt[row]; };
    const Float same = factor_of<Isa>(Isa::set(a.rate_is_one ? *dt * *a.rate : 0.0f));
    // `count` rows from number r on
    const auto scan = [&](int64_t r, auto count, Float* out) {
      float added[count.kCount];
      for (int i = 0; i < count; ++i) added[i] = step(r + i) * x[r + i];
      const auto with = [&](const auto& keep) {
        scan_rows<Isa, count.kCount>(a, added, b, c, from + r * a.n, a.state + r * a.n, keep, out);
      };
      if (a.rate_is_one) return with([&](int, int64_t, auto) { return same; });
      with([&](int row, int64_t i, auto part) {
        const Float rate = part.load(a.rate + (r + row) * a.rate_stride + i);
        return factor_of<Isa>(Isa::mul(Isa::set(step(r + row)), rate));
      });
    };
    each_register<Isa>(a.rows, [&](int64_t first, auto part) {
      Float sums[Isa::kLanes];
      int64_t lane = 0;
      const int64_t lanes = std::min<int64_t>(Isa::kLanes, a.rows - first);
      for (; lane + kScanRows<Isa> <= lanes; lane += kScanRows<Isa>) {
        scan(first + lane, Count<kScanRows<Isa>>(), sums + lane);
      }
      for (; lane < lanes; ++lane) scan(first + lane, Count<1>(), sums + lane);
      for (; lane < Isa::kLanes; ++lane) sums[lane] = Isa::set(0.0f);
      Float out = Isa::add_float(Isa::reduce_adds(sums), Isa::set(0.0f));
      if (a.skip != nullptr) {
        const Float skip = a.shares_dt ? Isa::set(*a.skip) : part.load(a.skip + first);
        out = Isa::mul_add(skip, part.load(x + first), out);
      }
      part.store(a.out + t * a.rows + first, out);
    });
  }
}

}  // namespace
}  // namespace dynquant
