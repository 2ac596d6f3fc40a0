// The heads of attention in tensors, and how rotary position embeddings turn them.
#pragma once

#include <algorithm>

#include "attention_core.h"
#include "ops.h"

namespace dynquant {

// x[B, rows, heads, D] as it lies in memory, or x[B, heads, rows, D], as caches have keys and
// values; copied where the values of a head do not lie together.
struct HeadsOf {
  enum class Order { rows_first, heads_first };

  Tensor holder;
  Dtype dtype;
  Heads heads;
  Order order = Order::rows_first;
  int64_t batch, rows, count, dim;

  HeadsOf(const Tensor& x, const char* name, Order order_ = Order::rows_first)
      : HeadsOf(x, check_float(x, name), name, order_) {}

  HeadsOf(const Tensor& x, Dtype dtype_, const char* name, Order order_)
      : holder(x), dtype(dtype_), order(order_) {
    const bool rows_first = order == Order::rows_first;
    check(x.dim() == 4, name, " must have four dimensions [B, ",
          rows_first ? "rows, heads" : "heads, rows", ", D], got ", ShapeOf(x));
    if (x.size(3) > 1 && x.stride(3) != 1) holder = torch::stable::contiguous(x);
    const int64_t row = rows_first ? 1 : 2, head = 3 - row;
    batch = x.size(0), rows = x.size(row), count = x.size(head), dim = x.size(3);
    const int64_t bytes = bytes_of(dtype);
    heads = {static_cast<char*>(const_cast<void*>(holder.const_data_ptr())),
             holder.stride(0) * bytes, holder.stride(row) * bytes, holder.stride(head) * bytes};
  }

  // The heads of `dim` values that lie together in each row of x[B, rows, K], which has no gaps.
  HeadsOf(const Tensor& x, int64_t dim_)
      : holder(x),
        dtype(check_float(x, "x")),
        batch(x.size(0)),
        rows(x.size(1)),
        count(x.size(2) / dim_),
        dim(dim_) {
    const int64_t head = dim * bytes_of(dtype), row = count * head;
    heads = {static_cast<char*>(const_cast<void*>(holder.const_data_ptr())), rows * row, row, head};
  }
};

// The heads of keys or values, in floats, or in int8 with the scale of each vector: [B, rows,
// heads] or [B, heads, rows], as the vectors lie.
struct KeptHeads : HeadsOf {
  std::optional<Tensor> scale_holder;
  Heads scale = {};

  KeptHeads(const Tensor& x, const std::optional<Tensor>& scale_, const char* name,
            const char* scale_name, Order order_ = Order::rows_first)
      : HeadsOf(x, kept_dtype(x, name), name, order_), scale_holder(scale_) {
    const bool is_int8 = dtype == Dtype::i8;
    check(is_int8 == scale_.has_value(), scale_name, " goes with a ", name,
          " in int8 and with no other, got a ", name,
          is_int8 ? " in int8 without it" : " in floats");
    if (!is_int8) return;
    check_tensor(*scale_, scale_name, {ScalarType::Float});
    check_shape(*scale_, scale_name, {x.size(0), x.size(1), x.size(2)});
    constexpr int64_t kBytes = sizeof(float);
    const int64_t row = order == Order::rows_first ? 1 : 2;
    scale = {static_cast<char*>(const_cast<void*>(scale_->const_data_ptr())),
             scale_->stride(0) * kBytes, scale_->stride(row) * kBytes,
             scale_->stride(3 - row) * kBytes};
  }

 private:
  static Dtype kept_dtype(const Tensor& x, const char* name) {
    check_tensor(x, name,
                 {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char});
    return x.scalar_type() == ScalarType::Char ? Dtype::i8 : check_float(x, name);
  }
};

// That of an attention of these.
AttentionShape checked_shape(const HeadsOf& query, const KeptHeads& key, const KeptHeads& value);

// scaled_dot_product of these, into a tensor of that shape, which has as many values as the query.
Tensor attended(const HeadsOf& query, const KeptHeads& key, const KeptHeads& value,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias,
                bool is_causal, std::optional<double> scale, bool integers,
                std::optional<double> softcap, const std::optional<Tensor>& sinks,
                const std::vector<int64_t>& shape);

// The angles of a rotary embedding: cos and sin [B, L, R] or [L, R], in fp32. Interleaved, they are
// [.., R / 2]: one for each pair of neighbors.
class Angles {
 public:
  Angles(const Tensor& cos, const Tensor& sin, bool interleaved, int64_t batch, int64_t rows,
         int64_t dim)
      : interleaved_(interleaved),
        cos_(dense(cos, "cos", batch, rows, dim)),
        sin_(dense(sin, "sin", batch, rows, dim)) {
    check(cos.dim() == sin.dim() && cos.size(-1) == sin.size(-1) && cos.size(0) == sin.size(0),
          "cos and sin must have one shape, got ", ShapeOf(cos), " and ", ShapeOf(sin));
    dim_ = cos_.size(cos_.dim() - 1) * of_each();
    const bool each = cos_.dim() == 3 && cos_.size(0) > 1;
    batch_stride_ = each ? rows * dim_ : 0;
    if (interleaved_) {
      cos_ = of_pairs(cos_, 1.0f);
      sin_ = of_pairs(sin_, -1.0f);
    }
    cos_data_ = static_cast<const float*>(cos_.const_data_ptr());
    sin_data_ = static_cast<const float*>(sin_.const_data_ptr());
  }

  // Turns the first values of a head; y may be x.
  void turn(const Kernels& kernels, Dtype dtype, int64_t b, int64_t row, const void* x,
            void* y) const {
    const int64_t at = b * batch_stride_ + row * dim_;
    kernels.rotary({dtype, x, dim_, cos_data_ + at, sin_data_ + at, y, interleaved_});
  }

 private:
  int64_t of_each() const { return interleaved_ ? 2 : 1; }  // how many values an angle turns

  Tensor dense(const Tensor& t, const char* name, int64_t batch, int64_t rows, int64_t dim) const {
    check_float(t, name);
    const char* last = interleaved_ ? ", R / 2]" : ", R]";
    const bool fits = t.dim() == 2 || (t.dim() == 3 && (t.size(0) == batch || t.size(0) == 1));
    check(fits && t.size(t.dim() - 2) == rows, name, " must have the shape [", rows, last, " or [",
          batch, ", ", rows, last, ", got ", ShapeOf(t));
    const int64_t angles = t.size(t.dim() - 1);
    check(angles > 0 && angles <= dim / of_each() && angles * of_each() % 2 == 0, name,
          " must turn an even number R of values of a head of ", dim, " and have the shape [..",
          last, ", got ", ShapeOf(t));
    const Tensor widened =
        t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
    return dynquant::dense(widened);
  }

  // Each of them twice, the first time multiplied by `first`.
  static Tensor of_pairs(const Tensor& t, float first) {
    const int64_t n = t.numel();
    Tensor pairs = empty({2 * n}, ScalarType::Float);
    const float* from = static_cast<const float*>(t.const_data_ptr());
    float* to = static_cast<float*>(pairs.mutable_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      to[2 * i] = first * from[i];
      to[2 * i + 1] = from[i];
    }
    return pairs;
  }

  const bool interleaved_;
  Tensor cos_, sin_;
  const float *cos_data_, *sin_data_;
  int64_t dim_, batch_stride_;
};

}  // namespace dynquant
