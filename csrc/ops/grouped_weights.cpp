#include "grouped_weights.h"

#include "../cpu/layout.h"

namespace dynquant {
namespace {

int64_t checked_columns(int64_t n, const char* name) {
  check(n >= 0 && n < kMaxN, name, " must lie in [0, ", kMaxN - 1, "], got ", n);
  return n;
}

Tensor checked_packed(const Tensor& t, int64_t groups, int64_t n, int64_t k,
                      const GroupedNames& names) {
  check_tensor(t, names.weight, {ScalarType::Char});
  check(k <= kMaxK, "x has K = ", k, ", more than ", kMaxK);
  const int64_t bytes = packed_bytes(n, k);
  check(t.dim() == 2 && t.size(0) == groups && t.size(1) >= bytes, names.weight,
        " must have the shape [", groups, ", ", bytes, " or more] for ", names.n, " = ", n,
        " and K = ", k, " of x, got ", ShapeOf(t));
  return t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

Tensor checked_half(const Tensor& t, int64_t groups, int64_t n, int64_t k,
                    const GroupedNames& names) {
  check_tensor(t, names.weight, {ScalarType::BFloat16, ScalarType::Half});
  check_shape(t, names.weight, {groups, n, k});
  return t;
}

std::optional<Tensor> checked_scale(const std::optional<Tensor>& t, int64_t groups, int64_t n,
                                    const char* name) {
  if (!t.has_value()) return t;
  check_tensor(*t, name, {ScalarType::Float});
  check(t->dim() == 2 && t->size(0) == groups && (t->size(1) == n || t->size(1) == 1), name,
        " must have the shape [", groups, ", ", n, "] or [", groups, ", 1], got ", ShapeOf(*t));
  return dense(*t);
}

}  // namespace

int64_t checked_groups(const Tensor& counts) {
  check_tensor(counts, "counts", {ScalarType::Long});
  check(counts.dim() == 1, "counts must have one dimension [E], got ", ShapeOf(counts));
  return counts.size(0);
}

int64_t checked_depth(const Tensor& x) {
  check(x.dim() == 2, "x must have two dimensions [M, K], got ", ShapeOf(x));
  return x.size(1);
}

std::vector<int64_t> sizes_of_groups(const Tensor& counts, int64_t m) {
  const Tensor held = dense(counts);
  const int64_t* values = static_cast<const int64_t*>(held.const_data_ptr());
  int64_t left = m;
  for (int64_t group = 0; group < held.size(0); ++group) {
    check(values[group] >= 0, "counts must not be negative, got ", values[group]);
    check(values[group] <= left, "counts must add up to at most M, the ", m, " rows of x");
    left -= values[group];
  }
  return std::vector<int64_t>(values, values + held.size(0));
}

GroupedWeights::GroupedWeights(int64_t given_groups, int64_t k, const Tensor& given_weight,
                               const std::optional<Tensor>& given_scale,
                               const std::optional<Tensor>& given_bias, int64_t given_n,
                               const GroupedNames& names)
    : groups(given_groups),
      n(checked_columns(given_n, names.n)),
      weight(given_scale.has_value() ? checked_packed(given_weight, groups, n, k, names)
                                     : checked_half(given_weight, groups, n, k, names)),
      weight_scale(checked_scale(given_scale, groups, n, names.weight_scale)),
      bias(given_bias, {groups, n}, names.bias) {}

}  // namespace dynquant
