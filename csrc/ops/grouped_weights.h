// Weights of groups of rows, as linear_grouped and experts take them, which are checked alike on
// every device.
#pragma once

#include <vector>

#include "tensors.h"

namespace dynquant {

// How many rows each group has: the values of `counts`, on the host, which add up to at most m.
std::vector<int64_t> sizes_of_groups(const Tensor& counts, int64_t m);

// How messages call the arguments.
struct GroupedNames {
  const char* weight = "weight";
  const char* weight_scale = "weight_scale";
  const char* bias = "bias";
  const char* n = "n";
};

// How many groups there are in counts[E], and K of x[M, K].
int64_t checked_groups(const Tensor& counts);
int64_t checked_depth(const Tensor& x);

// A weight [N, K] for each group.
struct GroupedWeights {
  int64_t groups, n;
  // Packed weights as dense rows [E, bytes or more]; or bf16 or fp16 [E, N, K].
  Tensor weight;
  std::optional<Tensor> weight_scale;  // dense [E, N] or [E, 1]; none where weights have 16 bits
  FloatBias bias;                      // [E, N]

  // Null where there is none.
  const float* bias_of(int64_t group) const {
    return bias.data == nullptr ? nullptr : bias.data + group * n;
  }

  GroupedWeights(int64_t given_groups, int64_t k, const Tensor& given_weight,
                 const std::optional<Tensor>& given_scale, const std::optional<Tensor>& given_bias,
                 int64_t given_n, const GroupedNames& names = {});
};

}  // namespace dynquant
