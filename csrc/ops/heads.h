// The heads of attention in tensors, and how rotary position embeddings turn them.
#pragma once

#include <algorithm>

#include "attention_core.h"
#include "ops.h"

namespace dynquant {

// x[B, rows, heads, D] as it lies in memory, copied where the values of a head do not lie together.
struct HeadsOf {
  Tensor holder;
  Heads heads;

  HeadsOf(const Tensor& x, const char* name) : holder(x) {
    check(x.dim() == 4, name, " must have four dimensions [B, rows, heads, D], got ", ShapeOf(x));
    if (x.size(3) > 1 && x.stride(3) != 1) holder = torch::stable::contiguous(x);
    const int64_t bytes = static_cast<int64_t>(x.element_size());
    heads = {static_cast<char*>(const_cast<void*>(holder.const_data_ptr())),
             holder.stride(0) * bytes, holder.stride(1) * bytes, holder.stride(2) * bytes};
  }
};

// The angles of a rotary embedding: cos and sin [B, L, R] or [L, R], in fp32.
class Angles {
 public:
  Angles(const Tensor& cos, const Tensor& sin, int64_t batch, int64_t rows, int64_t dim)
      : cos_(dense(cos, "cos", batch, rows, dim)), sin_(dense(sin, "sin", batch, rows, dim)) {
    check(cos.dim() == sin.dim() && cos.size(-1) == sin.size(-1) && cos.size(0) == sin.size(0),
          "cos and sin must have one shape, got ", ShapeOf(cos), " and ", ShapeOf(sin));
    dim_ = cos_.size(cos_.dim() - 1);
    const bool each = cos_.dim() == 3 && cos_.size(0) > 1;
    batch_stride_ = each ? rows * dim_ : 0;
    cos_data_ = static_cast<const float*>(cos_.const_data_ptr());
    sin_data_ = static_cast<const float*>(sin_.const_data_ptr());
  }

  // Turns the first values of a head; y may be x.
  void turn(const Kernels& kernels, Dtype dtype, int64_t b, int64_t row, const void* x,
            void* y) const {
    const int64_t at = b * batch_stride_ + row * dim_;
    kernels.rotary({dtype, x, dim_, cos_data_ + at, sin_data_ + at, y});
  }

 private:
  static Tensor dense(const Tensor& t, const char* name, int64_t batch, int64_t rows, int64_t dim) {
    check_float(t, name);
    const bool fits = t.dim() == 2 || (t.dim() == 3 && (t.size(0) == batch || t.size(0) == 1));
    check(fits && t.size(t.dim() - 2) == rows, name, " must have the shape [", rows, ", R] or [",
          batch, ", ", rows, ", R], got ", ShapeOf(t));
    const int64_t turned = t.size(t.dim() - 1);
    check(turned > 0 && turned % 2 == 0 && turned <= dim, name,
          " must turn an even number of values of a head of ", dim, ", got ", ShapeOf(t));
    const Tensor widened =
        t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
    return dynquant::dense(widened);
  }

  Tensor cos_, sin_;
  const float *cos_data_, *sin_data_;
  int64_t dim_, batch_stride_;
};

}  // namespace dynquant
