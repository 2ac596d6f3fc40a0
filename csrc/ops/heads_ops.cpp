// rotary and scaled_dot_product.
#include "heads.h"
#include "weight_traffic.h"

namespace dynquant {

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  const HeadsOf in(x, "x");
  const Dtype dtype = in.dtype;
  const int64_t batch = in.batch, rows = in.rows, count = in.count, dim = in.dim;
  const Angles angles(cos, sin, interleaved, batch, rows, dim);
  const Kernels& kernels = kernels_in_use();
  Tensor y = empty({batch, rows, count, dim}, x.scalar_type());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(y.element_size());
  run_rows(batch * rows, count * dim * 4, [&](int64_t m) {
    for (int64_t h = 0; h < count; ++h) {
      const char* from = in.heads.at(m / rows, m % rows, h);
      char* to = out + (m * count + h) * dim * bytes;
      std::copy(from, from + dim * bytes, to);
      angles.turn(kernels, dtype, m / rows, m % rows, to, to);
    }
  });
  return y;
}

AttentionShape checked_shape(const HeadsOf& query, const KeptHeads& key, const KeptHeads& value) {
  if (query.dtype != Dtype::f32) {
    check_tensor(key.holder, "key", {query.holder.scalar_type(), ScalarType::Char});
  }
  check_tensor(value.holder, "value", {key.holder.scalar_type()});
  const AttentionShape shape = {query.batch, query.rows, key.rows,
                                query.count, key.count,  query.dim};
  check(shape.dim > 0, "query must have D > 0, got ", ShapeOf(query.holder));
  check(key.batch == shape.batch && key.dim == shape.dim, "key must have the shape [", shape.batch,
        key.order == HeadsOf::Order::rows_first ? ", S, KV, " : ", KV, S, ", shape.dim,
        "], like query, got ", ShapeOf(key.holder));
  for (int64_t d = 0; d < 4; ++d) {
    check(value.holder.size(d) == key.holder.size(d), "value must have the shape of key, got ",
          ShapeOf(value.holder));
  }
  check(shape.keys > 0, "key must have a row at least, got ", ShapeOf(key.holder));
  check(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0,
        "the heads of the query must be a multiple of those of key and value, got ", shape.heads,
        " and ", shape.kv_heads);
  return shape;
}

Tensor attended(const HeadsOf& query, const KeptHeads& key, const KeptHeads& value,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias,
                bool is_causal, std::optional<double> scale, bool integers,
                std::optional<double> softcap, const std::optional<Tensor>& sinks,
                const std::vector<int64_t>& shape_of_result) {
  const Dtype dtype = query.dtype, kept = key.dtype;
  const AttentionShape shape = checked_shape(query, key, value);
  check(kept != Dtype::i8 || !integers,
        "integers must be False where key is in int8: it takes keys in floats, got True");
  AttentionCore core(kernels_in_use(), dtype, kept, shape, mask, position_bias, is_causal, scale,
                     integers);
  if (softcap.has_value()) core.cap_scores(*softcap);
  if (sinks.has_value()) core.add_sinks(*sinks);
  Tensor out = empty(shape_of_result, query.holder.scalar_type());
  const int64_t head = shape.dim * bytes_of(dtype);
  AttentionHeads heads = {query.heads,
                          key.heads,
                          value.heads,
                          {static_cast<char*>(out.mutable_data_ptr()),
                           shape.rows * shape.heads * head, shape.heads * head, head},
                          key.scale,
                          value.scale};
  // Smaller ones are read as fast either way.
  constexpr int64_t kFarBytes = 1 << 20;
  const int64_t vectors = 2 * shape.batch * shape.keys * shape.kv_heads;
  const int64_t read = vectors * shape.dim * bytes_of(kept);
  heads.is_far = core.are_few(shape.rows) && read >= kFarBytes &&
                 comes_from_memory(value.heads.data, read, num_threads());
  core.attend_all(heads);
  return out;
}

Tensor scaled_dot_product(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& position_bias, bool is_causal,
                          std::optional<double> scale, bool integers,
                          const std::optional<Tensor>& key_scale,
                          const std::optional<Tensor>& value_scale, std::optional<double> softcap,
                          const std::optional<Tensor>& sinks) {
  const HeadsOf q(query, "query");
  const KeptHeads k(key, key_scale, "key", "key_scale");
  const KeptHeads v(value, value_scale, "value", "value_scale");
  return attended(q, k, v, mask, position_bias, is_causal, scale, integers, softcap, sinks,
                  {q.batch, q.rows, q.count, q.dim});
}

}  // namespace dynquant
