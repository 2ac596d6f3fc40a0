// A packed weight for each group of a product's columns, with what they need for each column.
#pragma once

#include <optional>
#include <vector>

#include "columns.h"
#include "packed.h"

namespace dynquant {

// Groups have as many columns each, and one K.
class ProductOfGroups {
 public:
  // packed: one packed weight, or a row for each group that begins with one. There are as many
  // scales as columns of all groups; of one group, a single one may do.
  ProductOfGroups(const Tensor& packed, const Tensor& weight_scale,
                  const std::optional<Tensor>& bias);

  int64_t groups() const { return static_cast<int64_t>(weights_.size()); }
  int64_t n() const { return groups() * columns(); }
  int64_t columns() const { return weights_.front().n; }  // of a group
  int64_t k() const { return weights_.front().k; }

  const Packed& weight(int64_t group) const { return weights_[static_cast<size_t>(group)]; }
  // For a group's fp32 results, the first of which is at `out`.
  EpilogueArgs to(int64_t group, float* out, int64_t out_stride) const;

 private:
  const Tensor holder_;
  const std::vector<Packed> weights_;
  const Columns columns_;
};

}  // namespace dynquant
