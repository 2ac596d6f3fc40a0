// What the blocks do to a row at their ends: a residual, a norm.
#pragma once

#include "tensors.h"

namespace dynquant {

// What messages call the parts of a norm.
struct NormNames {
  const char* norm = "norm";
  const char* weight = "weight";
  const char* bias = "bias";
  const char* eps = "eps";
};

class RowNorm {
 public:
  // Over rows of n values; `norm` is a number of the enum Norm.
  RowNorm(int64_t norm, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
          double eps, int64_t n, const NormNames& names = {})
      : norm_(checked(norm, names)),
        n_(n),
        weight_(weight, n, names.weight),
        bias_(bias, n, names.bias),
        eps_(static_cast<float>(eps)) {
    check(norm_ != Norm::none || !(weight.has_value() || bias.has_value()), names.weight, " and ",
          names.bias, " belong to a norm, and ", names.norm, " is 0");
    check(norm_ <= Norm::layer || !bias.has_value(), names.bias, " is given, and the norm of ",
          names.norm, " = ", norm, " has none");
    check(eps >= 0.0, names.eps, " must not be negative, got ", eps);
  }

  bool is_none() const { return norm_ == Norm::none; }
  int64_t size() const { return n_; }

  // y = norm(residual + x); residual may be null, y may be x. Strides are bytes between rows.
  void apply(const Kernels& kernels, Dtype dtype, const void* x, const void* residual, void* y,
             int64_t rows = 1, int64_t x_stride = 0, int64_t residual_stride = 0,
             int64_t y_stride = 0) const {
    kernels.norm({norm_, dtype, x, residual, n_, weight_.data, bias_.data, eps_, y, rows, x_stride,
                  residual_stride, y_stride});
  }

 private:
  static Norm checked(int64_t norm, const NormNames& names) {
    check(norm >= 0 && norm <= static_cast<int64_t>(Norm::rms_plus_one), names.norm,
          " must be 0 (none), 1 (layer norm), 2 (RMS norm) or 3 (RMS norm times 1 + weight), got ",
          norm);
    return static_cast<Norm>(norm);
  }

  Norm norm_;
  int64_t n_;
  FloatBias weight_, bias_;
  float eps_;
};

constexpr NormNames kNormBefore = {"norm_before", "norm_before_weight", "norm_before_bias",
                                   "norm_before_eps"};
constexpr NormNames kNormAfter = {"norm_after", "norm_after_weight", "norm_after_bias",
                                  "norm_after_eps"};

}  // namespace dynquant
