// A packed weight with what its products need for each column, as ops that have several take it.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "../cpu/layout.h"
#include "columns.h"
#include "packed.h"

namespace dynquant {

struct Int8Product {
  const char* name;
  Packed weight;
  Columns columns;

  Int8Product(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
              const ColumnNames& names)
      : name(names.packed),
        weight(check_packed(packed, names.packed)),
        columns(scale, bias, weight.n, names) {
    columns.args.out_dtype = Dtype::f32;
    columns.args.out_stride = weight.n;
  }

  int64_t n() const { return weight.n; }
  int64_t k() const { return weight.k; }

  // For results of that dtype, the first of which is at `out`.
  EpilogueArgs to(void* out, int64_t out_stride, Dtype dtype) const {
    EpilogueArgs args = columns.args;
    args.out = out;
    args.out_stride = out_stride;
    args.out_dtype = dtype;
    return args;
  }
};

// N and K of one product that stands for several.
struct ProductSize {
  int64_t n, k;
};

// With the K of the first and as many values as all of them. Null stands for none.
inline ProductSize size_of(const Int8Product& first,
                           std::initializer_list<const Int8Product*> others) {
  const int64_t k = std::max<int64_t>(1, first.k());
  int64_t values = first.n() * first.k();
  for (const Int8Product* one : others) values += one == nullptr ? 0 : one->n() * one->k();
  return {ceil_div(values, k), k};
}

inline const Int8Product* pointer_to(const std::optional<Int8Product>& product) {
  return product.has_value() ? &*product : nullptr;
}

// Where a weight is optional, its scale and bias come with it or not at all.
inline std::optional<Int8Product> optional_product(const std::optional<Tensor>& packed,
                                                   const std::optional<Tensor>& scale,
                                                   const std::optional<Tensor>& bias,
                                                   const ColumnNames& names) {
  check(packed.has_value() == scale.has_value(), names.packed, " and ", names.weight_scale,
        " must both be given or neither");
  check(packed.has_value() || !bias.has_value(), names.bias, " is given without ", names.packed);
  if (!packed.has_value()) return std::nullopt;
  return Int8Product(*packed, *scale, bias, names);
}

}  // namespace dynquant
