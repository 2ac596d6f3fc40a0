#include "grouped_weights.h"

#include "../cpu/layout.h"

namespace dynquant {
namespace {

int64_t checked_groups(const Tensor& counts) {
  check_tensor(counts, "counts", {ScalarType::Long});
  check(counts.dim() == 1, "counts must have one dimension [E], got ", ShapeOf(counts));
  return counts.size(0);
}

int64_t checked_columns(int64_t n) {
  check(n >= 0 && n < kMaxN, "n must lie in [0, ", kMaxN - 1, "], got ", n);
  return n;
}

int64_t checked_depth(const Tensor& x) {
  check(x.dim() == 2, "x must have two dimensions [M, K], got ", ShapeOf(x));
  return x.size(1);
}

Tensor checked_packed(const Tensor& t, int64_t groups, int64_t n, int64_t k) {
  check_tensor(t, "weight", {ScalarType::Char});
  check(k <= kMaxK, "x has K = ", k, ", more than ", kMaxK);
  const int64_t bytes = packed_bytes(n, k);
  check(t.dim() == 2 && t.size(0) == groups && t.size(1) >= bytes, "weight must have the shape [",
        groups, ", ", bytes, " or more] for n = ", n, " and K = ", k, " of x, got ", ShapeOf(t));
  return t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

Tensor checked_half(const Tensor& t, int64_t groups, int64_t n, int64_t k) {
  check_tensor(t, "weight", {ScalarType::BFloat16, ScalarType::Half});
  check_shape(t, "weight", {groups, n, k});
  return t;
}

std::optional<Tensor> checked_scale(const std::optional<Tensor>& t, int64_t groups, int64_t n) {
  if (!t.has_value()) return t;
  check_tensor(*t, "weight_scale", {ScalarType::Float});
  check(t->dim() == 2 && t->size(0) == groups && (t->size(1) == n || t->size(1) == 1),
        "weight_scale must have the shape [", groups, ", ", n, "] or [", groups, ", 1], got ",
        ShapeOf(*t));
  return dense(*t);
}

}  // namespace

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

GroupedWeights::GroupedWeights(const Tensor& x, const Tensor& counts, const Tensor& given_weight,
                               const std::optional<Tensor>& given_scale,
                               const std::optional<Tensor>& given_bias, int64_t given_n)
    : groups(checked_groups(counts)),
      n(checked_columns(given_n)),
      weight(given_scale.has_value() ? checked_packed(given_weight, groups, n, checked_depth(x))
                                     : checked_half(given_weight, groups, n, checked_depth(x))),
      weight_scale(checked_scale(given_scale, groups, n)),
      bias(given_bias, {groups, n}) {}

}  // namespace dynquant
