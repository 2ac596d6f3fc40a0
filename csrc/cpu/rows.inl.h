// The same columns of several rows as if they were one register: in one row alone, every step of a
// long chain waits for the one before it.
#pragma once

#include <stdint.h>

#include "pair.inl.h"

namespace dynquant {
namespace {

// `Isa` has the operations on one register of each of R rows, a power of two; One is that of one
// row.
template <class Single, int R>
struct Rows {
  using One = Single;
  using Half = Rows<Single, R / 2>;
  using Isa = Pair<typename Half::Isa>;
  using Float = typename Isa::Float;
  static constexpr int kRows = R;

  // From value `i` of each row on, as much as `part` says.
  template <class T, class Part>
  static inline Float load(T* const* rows, int64_t i, Part part) {
    return {Half::load(rows, i, part), Half::load(rows + R / 2, i, part)};
  }
  template <class T, class Part>
  static inline void store(T* const* rows, int64_t i, Float x, Part part) {
    Half::store(rows, i, x.first, part);
    Half::store(rows + R / 2, i, x.second, part);
  }
  // The same for each row, and the value of each row in all its lanes.
  static inline Float same(typename Single::Float x) { return {Half::same(x), Half::same(x)}; }
  static inline typename Isa::Mask same_mask(typename Single::Mask mask) {
    return {Half::same_mask(mask), Half::same_mask(mask)};
  }
  static inline Float of(const float* values) {
    return {Half::of(values), Half::of(values + R / 2)};
  }
  // values[r] = f(the register of row r)
  template <class F>
  static inline void reduce(Float x, const F& f, float* values) {
    Half::reduce(x.first, f, values);
    Half::reduce(x.second, f, values + R / 2);
  }
};

template <class Single>
struct Rows<Single, 1> {
  using One = Single;
  using Isa = Single;
  using Float = typename Isa::Float;
  static constexpr int kRows = 1;

  template <class T, class Part>
  static inline Float load(T* const* rows, int64_t i, Part part) {
    return part.load(rows[0] + i);
  }
  template <class T, class Part>
  static inline void store(T* const* rows, int64_t i, Float x, Part part) {
    part.store(rows[0] + i, x);
  }
  static inline Float same(Float x) { return x; }
  static inline typename Isa::Mask same_mask(typename Isa::Mask mask) { return mask; }
  static inline Float of(const float* values) { return Isa::set(values[0]); }
  template <class F>
  static inline void reduce(Float x, const F& f, float* values) {
    values[0] = f(x);
  }
};

// f(row, together) for R rows at once from `row` on, as far as there are so many, where `together`
// is a value of their type. Gives the row after them.
template <class Isa, int R, class F>
DYNQUANT_FLATTEN inline int64_t each_several_rows(int64_t row, int64_t rows, const F& f) {
  for (; row + R <= rows; row += R) f(row, Rows<Isa, R>());
  return row;
}

// The same for all rows, at most Most at once, which is 4 or 8, the last ones one by one. Where
// registers are arrays in memory, several of them gain nothing, and compile for minutes.
template <class Isa, int Most, class F>
inline void each_rows(int64_t rows, const F& f) {
  int64_t row = 0;
  if constexpr (!__is_class(typename Isa::Float)) {
    if constexpr (Most >= 8) row = each_several_rows<Isa, 8>(row, rows, f);
    row = each_several_rows<Isa, 4>(row, rows, f);
  }
  for (; row < rows; ++row) f(row, Rows<Isa, 1>());
}

}  // namespace
}  // namespace dynquant
