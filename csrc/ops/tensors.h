// What the ops need of torch's stable tensors: checks with messages, rows, allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

namespace dynquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor's shape as a part of a message: made into text only where there is a message.
struct ShapeOf {
  explicit ShapeOf(const Tensor& t) : tensor(t) {}
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& out, const ShapeOf& shape);

const char* dtype_text(ScalarType dtype);

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (__builtin_expect(!holds, 0)) fail(parts...);
}

// A dense tensor of one of the dtypes on this library's device; anything else is an error that
// names the argument.
void check_tensor(const Tensor& t, const char* name, std::initializer_list<ScalarType> dtypes);

// An error that names the argument where its shape is another.
void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape);

// An error where an op cannot write to its argument `state` as it lies.
void check_written(const Tensor& state);

// The tensor itself where it is contiguous, else a copy that is.
Tensor dense(const Tensor& t);

// An error that names the argument where its shape is not that of `like`.
void check_same_shape(const Tensor& t, const char* name, const Tensor& like, const char* like_name);

// fp32, bf16 or fp16.
Dtype check_float(const Tensor& t, const char* name);
Dtype check_out_dtype(ScalarType dtype);

// x[..., K] as rows of K adjacent elements; copied only where its strides do not allow that.
struct Rows {
  Tensor holder;
  const char* data;
  int64_t m;
  int64_t k;
  int64_t stride;  // bytes between rows
};
Rows rows_of(const Tensor& t, const char* name);

// The leading dimensions of `like`, followed by `last` where that is not negative.
std::vector<int64_t> leading_shape(const Tensor& like, int64_t last);

// All dimensions of `like`, followed by `last`.
std::vector<int64_t> shape_with(const Tensor& like, int64_t last);

// On this library's device.
Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype);

// One fp32 or int32 value for each row, or a single one for all.
struct PerRow {
  Tensor holder;
  const void* data;
  int64_t step;
  template <class T>
  T at(int64_t m) const {
    return static_cast<const T*>(data)[m * step];
  }
};
PerRow per_row(const Tensor& t, const char* name, ScalarType dtype, const Tensor& rows);

// A bias [N], or of another shape, in fp32; null data where there is none.
struct FloatBias {
  FloatBias(const std::optional<Tensor>& bias, int64_t n, const char* name = "bias")
      : FloatBias(bias, {n}, name) {}
  FloatBias(const std::optional<Tensor>& bias, std::initializer_list<int64_t> shape,
            const char* name = "bias");
  std::optional<Tensor> holder;
  const float* data = nullptr;
};

}  // namespace dynquant
