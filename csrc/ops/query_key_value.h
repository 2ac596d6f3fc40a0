// Query, key and value of self attention: their products, and where their heads lie in a row.
#pragma once

#include <algorithm>
#include <optional>

#include "heads.h"

namespace dynquant {

constexpr ColumnNames kQuery = {"packed_q", "weight_scale_q", "bias_q"};
constexpr ColumnNames kKey = {"packed_k", "weight_scale_k", "bias_k"};
constexpr ColumnNames kValue = {"packed_v", "weight_scale_v", "bias_v"};
constexpr ColumnNames kOut = {"packed_out", "weight_scale_out", "bias_out"};

inline void check_sequences(const Tensor& x) {
  check(x.dim() == 3, "x must have three dimensions [B, L, K], got ", ShapeOf(x));
}

// The three of a row lie one after the other in a buffer: `width` values.
class QueryKeyValue {
 public:
  // x[B, L, K], checked; without key and value, query has the rows of all three. Gated, it has
  // behind the rows of each head as many of its gate.
  QueryKeyValue(const Tensor& x, Int8Product query, std::optional<Int8Product> key,
                std::optional<Int8Product> value, int64_t heads, int64_t kv_heads,
                const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                bool interleaved, bool gated = false)
      : query_(std::move(query)),
        key_(std::move(key)),
        value_(std::move(value)),
        query_parts_(gated ? 2 : 1),
        shape_(shape_of(x, heads, kv_heads)),
        width_(key_at() + 2 * shape_.kv_heads * shape_.dim) {
    check(cos.has_value() == sin.has_value(), "cos and sin must both be given or neither");
    if (!cos.has_value()) return;
    angles_.emplace(*cos, *sin, interleaved, shape_.batch, shape_.rows, shape_.dim);
  }

  const AttentionShape& shape() const { return shape_; }
  int64_t width() const { return width_; }
  // How many values a head of the query has, with those of its gate.
  int64_t query_dim() const { return query_parts_ * shape_.dim; }
  // Where key and value begin in a row, in values.
  int64_t key_at() const { return shape_.heads * query_dim(); }
  int64_t value_at() const { return key_at() + shape_.kv_heads * shape_.dim; }

  // Of their products and one more, or none.
  ProductSize size_with(const Int8Product* another) const {
    return size_of(query_, {pointer_to(key_), pointer_to(value_), another});
  }

  // f(product, the first column that it gives, what is multiplied next, null for none) for each of
  // the products of x.
  template <class F>
  void each_product(const F& f) const {
    f(query_, 0, pointer_to(key_));
    if (!key_.has_value()) return;
    f(*key_, key_at(), &*value_);
    f(*value_, value_at(), nullptr);
  }

  // The products of all rows into a buffer, on all threads.
  void multiply_all(const BlockRows& rows, const Rows& in, char* buffer) const {
    std::vector<Target> targets;
    each_product([&](const Int8Product& by, int64_t column, const Int8Product*) {
      targets.push_back({by.weight, by.to(buffer + column * rows.bytes, width_, rows.dtype)});
    });
    multiply(rows.kernels, rows.source(in), in.m, targets.data(),
             static_cast<int64_t>(targets.size()), rows.bytes);
  }

  // Those of some rows, in the calling thread, which reads `behind` after them, if anything.
  void multiply_block(const Product& product, const BlockRows& rows, const Rows& in, char* buffer,
                      const Int8Product* behind) const {
    for_each_block(product, in.m, in.k, product.row_multiple, [&](int64_t from, int64_t to) {
      const StagedBlock staged(product, rows.source(in), in.k, from, to - from,
                               Purpose::staged_rows);
      each_product([&](const Int8Product& by, int64_t column, const Int8Product* next) {
        const Int8Product* read = next == nullptr ? behind : next;
        staged.multiply(by.weight,
                        by.to(buffer + (from * width_ + column) * rows.bytes, width_, rows.dtype),
                        read == nullptr ? nullptr : read->weight.panels);
      });
    });
  }

  bool turns() const { return angles_.has_value(); }
  // Turns a head of the row m of x, in place.
  void turn_head(const BlockRows& rows, char* head, int64_t m) const {
    if (!turns()) return;
    angles_->turn(rows.kernels, rows.dtype, m / shape_.rows, m % shape_.rows, head, head);
  }
  // Query and key of that row, in the buffer.
  void turn(const BlockRows& rows, char* row, int64_t m) const {
    if (!turns()) return;
    for (int64_t h = 0; h < shape_.heads; ++h) {
      turn_head(rows, row + h * query_dim() * rows.bytes, m);
    }
    for (int64_t h = 0; h < shape_.kv_heads; ++h) {
      turn_head(rows, row + (key_at() + h * shape_.dim) * rows.bytes, m);
    }
  }

 private:
  AttentionShape shape_of(const Tensor& x, int64_t heads, int64_t kv_heads) const {
    check(heads > 0 && heads <= kMaxK, "heads must lie in [1, ", kMaxK, "], got ", heads);
    check(kv_heads > 0 && heads % kv_heads == 0,
          "kv_heads must be positive and divide heads = ", heads, ", got ", kv_heads);
    check(key_.has_value() == value_.has_value(),
          "packed_k and packed_v must both be given or neither");
    check(query_parts_ == 1 || key_.has_value(),
          "gated: it goes with packed_k and packed_v, which are not given");
    const int64_t parts = key_.has_value() ? heads * query_parts_ : heads + 2 * kv_heads;
    check(query_.n() > 0 && query_.n() % parts == 0, "packed_q must have N, a multiple of ", parts,
          ", got ", query_.n());
    const int64_t dim = query_.n() / parts;
    for (const std::optional<Int8Product>* part : {&key_, &value_}) {
      if (!part->has_value()) continue;
      check((*part)->n() == kv_heads * dim && (*part)->k() == query_.k(), (*part)->name,
            " must have the shape [", kv_heads * dim, ", ", query_.k(), "], got [", (*part)->n(),
            ", ", (*part)->k(), "]");
    }
    return {x.size(0), x.size(1), x.size(1), heads, kv_heads, dim};
  }

  const Int8Product query_;
  const std::optional<Int8Product> key_, value_;
  const int64_t query_parts_;
  const AttentionShape shape_;
  const int64_t width_;
  std::optional<Angles> angles_;
};

}  // namespace dynquant
