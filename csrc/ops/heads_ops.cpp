// rotary and scaled_dot_product.
#include "heads.h"
#include "weight_traffic.h"

namespace dynquant {

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const Dtype dtype = check_float(x, "x");
  const HeadsOf in(x, "x");
  const int64_t batch = x.size(0), rows = x.size(1), count = x.size(2), dim = x.size(3);
  const Angles angles(cos, sin, batch, rows, dim);
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

Tensor scaled_dot_product(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& position_bias, bool is_causal,
                          std::optional<double> scale, bool integers) {
  const Dtype dtype = check_float(query, "query");
  if (dtype == Dtype::f32) {  // of few rows, reading key and value takes longer than widening them
    check_float(key, "key");
  } else {
    check_tensor(key, "key", {query.scalar_type()});
  }
  check_tensor(value, "value", {key.scalar_type()});
  const Dtype kept_dtype = check_float(key, "key");
  const HeadsOf q(query, "query"), k(key, "key"), v(value, "value");
  const AttentionShape shape = {query.size(0), query.size(1), key.size(1),
                                query.size(2), key.size(2),   query.size(3)};
  check(shape.dim > 0, "query must have D > 0, got ", ShapeOf(query));
  check(key.size(0) == shape.batch && key.size(3) == shape.dim, "key must have the shape [",
        shape.batch, ", S, KV, ", shape.dim, "], like query, got ", ShapeOf(key));
  for (int64_t d = 0; d < 4; ++d) {
    check(value.size(d) == key.size(d), "value must have the shape of key, got ", ShapeOf(value));
  }
  check(shape.keys > 0, "key must have a row at least, got ", ShapeOf(key));
  check(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0,
        "the heads of the query must be a multiple of those of key and value, got ", shape.heads,
        " and ", shape.kv_heads);
  const AttentionCore core(kernels_in_use(), dtype, kept_dtype, shape, mask, position_bias, is_causal, scale,
                           integers);
  Tensor out = empty({shape.batch, shape.rows, shape.heads, shape.dim}, query.scalar_type());
  const int64_t head = shape.dim * static_cast<int64_t>(out.element_size());
  AttentionHeads heads = {q.heads,
                          k.heads,
                          v.heads,
                          {static_cast<char*>(out.mutable_data_ptr()),
                           shape.rows * shape.heads * head, shape.heads * head, head}};
  // Smaller ones are read as fast either way.
  constexpr int64_t kFarBytes = 1 << 20;
  const int64_t read = 2 * shape.batch * shape.keys * shape.kv_heads * shape.dim * bytes_of(kept_dtype);
  heads.is_far = core.are_few(shape.rows) && read >= kFarBytes &&
                 comes_from_memory(v.heads.data, read, num_threads());
  core.attend_all(heads);
  return out;
}

}  // namespace dynquant
