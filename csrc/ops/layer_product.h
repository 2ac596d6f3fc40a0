// A weight that rows of floats are multiplied by, whatever holds it, for the recurrent ops.
#pragma once

#include <optional>
#include <variant>

#include "activation.h"
#include "columns.h"
#include "half_matmul.h"
#include "packed.h"

namespace dynquant {

class LayerProduct {
 public:
  // A packed int8 weight; rows are quantized as `scheme` says.
  LayerProduct(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
               const ActivationScheme& scheme, const ColumnNames& names);
  // A float weight [N, K] in 16 bits, or in fp32 where that is allowed.
  LayerProduct(const Tensor& weight, const std::optional<Tensor>& bias, bool fp32_too,
               const ColumnNames& names);

  const char* name() const { return name_; }
  int64_t n() const;
  int64_t k() const;

  // What a product of so many rows takes on one thread.
  double nanoseconds(const Kernels& kernels, int64_t rows) const;

  // What a product of some rows must know of all of them.
  std::optional<QParams> whole(const Kernels& kernels, const Rows& rows, Dtype dtype) const;

  // The products in fp32, rows of n() values without gaps.
  void multiply(const Kernels& kernels, const Rows& rows, Dtype dtype,
                const std::optional<QParams>& whole, float* out) const;

 private:
  struct Int8 {
    Packed weight;
    Columns columns;
    ActivationScheme scheme;
  };
  struct Float {
    HalfWeight weight;
    FloatBias bias;
  };

  const char* name_;
  std::variant<Int8, Float> held_;
};

}  // namespace dynquant
