// relative_attention: scaled_dot_product with a bias that depends on distances.
#include <algorithm>

#include "distance_bias.h"
#include "heads.h"

namespace dynquant {
namespace {

// Vectors [count, H, D] of distances, and what holds them.
struct Vectors {
  Tensor holder;
  Heads heads;
  int64_t count;

  Vectors(const Tensor& x, const char* name, const HeadsOf& query, int64_t count_)
      : holder(x), count(count_) {
    check_tensor(x, name, {query.holder.scalar_type()});
    check_shape(x, name, {count, query.count, query.dim});
    if (x.size(2) > 1 && x.stride(2) != 1) holder = torch::stable::contiguous(x);
    const int64_t bytes = bytes_of(query.dtype);
    heads = {static_cast<char*>(const_cast<void*>(holder.const_data_ptr())), 0,
             holder.stride(0) * bytes, holder.stride(1) * bytes};
  }

  // The same from the last to the first.
  Heads reversed() const {
    return {heads.data + (count - 1) * heads.row_stride, 0, -heads.row_stride, heads.head_stride};
  }
};

std::optional<Vectors> vectors_of(const std::optional<Tensor>& x, const char* name,
                                  const HeadsOf& query, int64_t count) {
  if (!x.has_value()) return std::nullopt;
  return Vectors(*x, name, query, count);
}

}  // namespace

Tensor relative_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& position_key,
                          const std::optional<Tensor>& position_query,
                          const std::optional<Tensor>& mask, std::optional<double> scale,
                          bool integers) {
  const HeadsOf q(query, "query");
  check_tensor(key, "key", {query.scalar_type()});
  check_tensor(value, "value", {query.scalar_type()});
  const KeptHeads k(key, std::nullopt, "key", ""), v(value, std::nullopt, "value", "");
  const AttentionShape shape = checked_shape(q, k, v);
  check(shape.kv_heads == shape.heads, "key must have as many heads as query, ", shape.heads,
        ", got ", ShapeOf(key));
  // What is added to the scores of a head is kept: its size must be a number.
  constexpr double kMostScores = 1e15;
  check(static_cast<double>(shape.rows) * static_cast<double>(shape.keys) < kMostScores,
        "query and key have too many rows, ", shape.rows, " and ", shape.keys);
  const int64_t count = shape.rows + shape.keys - 1;
  const std::optional<Vectors> by_query = vectors_of(position_key, "position_key", q, count);
  const std::optional<Vectors> by_key = vectors_of(position_query, "position_query", q, count);
  const Kernels& kernels = kernels_in_use();
  const AttentionCore core(kernels, q.dtype, q.dtype, shape, mask, std::nullopt, false, scale,
                           integers);

  Tensor out = empty({shape.batch, shape.rows, shape.heads, shape.dim}, query.scalar_type());
  const int64_t items = shape.heads * shape.batch;
  if (items == 0 || shape.rows == 0) return out;
  std::optional<DistanceTerm> of_queries, of_keys;
  if (by_query.has_value()) {
    of_queries = {q.heads, by_query->heads, q.dtype, shape.rows, shape.keys};
  }
  if (by_key.has_value()) {
    of_keys = {k.heads, by_key->reversed(), q.dtype, shape.keys, shape.rows};
  }
  const HeadsOf to(out, "out");
  const AttentionHeads all = {q.heads, k.heads, v.heads, to.heads};
  const DistanceBias usual(kernels, of_queries, of_keys, shape.dim, core.scale(), integers);
  const double scores = static_cast<double>(items * shape.rows * shape.keys);
  const double nanoseconds = core.nanoseconds() + scores * usual.nanoseconds();
  const int64_t tasks = std::min(items, threads_worth(Threads::kPool, nanoseconds));
  // One head after the other, of which all sequences share the vectors.
  run_tasks(tasks, [&](int64_t task) {
    DistanceBias bias = usual;
    AttentionCore own = core;
    const int64_t stride = row_stride_of(shape.keys), values = shape.rows * stride;
    const int64_t bytes = bias.bytes();
    Pieces pieces(Purpose::distances, {bytes, values * static_cast<int64_t>(sizeof(float))});
    bias.take(pieces.next<uint8_t>(bytes));
    float* added = pieces.next<float>(values);
    if (!bias.is_none()) own.add_rows(added, stride);
    Fetch nothing;
    const int64_t first = items * task / tasks, end = items * (task + 1) / tasks;
    for (int64_t item = first; item < end; ++item) {
      const int64_t head = item / shape.batch, b = item % shape.batch;
      if (item == first || b == 0) bias.begin_head(head);
      if (!bias.is_none()) bias.compute(b, shape.rows, shape.keys, added, stride);
      own.attend(all, b, head, head + 1, 0, shape.rows, nothing);
    }
  });
  return out;
}

}  // namespace dynquant
