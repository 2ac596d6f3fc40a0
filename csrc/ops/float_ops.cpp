// activation, layer_norm, rms_norm, softmax and rotary: what lies between products.
#include "ops.h"
#include "parallel.h"
#include "row_norm.h"

namespace dynquant {
namespace {

// f(x, y) for each row of x and of a new tensor of its shape, where `cost` is that of one value.
template <class F>
Tensor each_row(const Tensor& x, const Rows& rows, int64_t cost, const F& f) {
  Tensor y = empty(leading_shape(x, rows.k), x.scalar_type());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t row_bytes = rows.k * static_cast<int64_t>(y.element_size());
  run_range(rows.m, rows.k * cost, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) f(rows.data + m * rows.stride, out + m * row_bytes);
  });
  return y;
}

constexpr int64_t kNormCost = 8;

}  // namespace

Activation check_activation(int64_t function, const char* name) {
  check(function >= 0 && function < kActivations, name, " must lie in [0, ", kActivations - 1,
        "] (none, gelu, gelu_tanh, silu, relu, quick_gelu, sigmoid, tanh, relu_squared), got ",
        function);
  return static_cast<Activation>(function);
}

Tensor activation(const Tensor& x, int64_t function) {
  const Dtype dtype = check_float(x, "x");
  const Activation checked = check_activation(function, "function");
  const Rows rows = rows_of(x, "x");
  const Kernels& kernels = kernels_in_use();
  return each_row(x, rows, kExpCost, [&](const char* from, char* to) {
    kernels.activate({checked, dtype, from, nullptr, rows.k, to});
  });
}

namespace {

Tensor normalize(const Tensor& x, Norm norm, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, double eps) {
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const RowNorm by(static_cast<int64_t>(norm), weight, bias, eps, rows.k);
  const Kernels& kernels = kernels_in_use();
  return each_row(x, rows, kNormCost,
                  [&](const char* from, char* to) { by.apply(kernels, dtype, from, nullptr, to); });
}

}  // namespace

Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps) {
  return normalize(x, Norm::layer, weight, bias, eps);
}

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, bool plus_one) {
  return normalize(x, plus_one ? Norm::rms_plus_one : Norm::rms, weight, std::nullopt, eps);
}

Tensor softmax(const Tensor& x) {
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const Kernels& kernels = kernels_in_use();
  return each_row(x, rows, 2 * kExpCost,
                  [&](const char* from, char* to) { kernels.softmax({dtype, from, rows.k, to}); });
}

}  // namespace dynquant
