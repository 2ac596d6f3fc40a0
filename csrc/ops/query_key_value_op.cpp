// query_key_value: what attention takes of new tokens, for a cache that keeps the others'.
#include "query_key_value.h"

namespace dynquant {
namespace {

// Where the heads of query, key or value go, and their norm on the way. Each has `dim` values, of
// which those behind the first `own`, a gate's, stay as they are.
struct HeadOutput {
  int64_t heads, own, dim;
  RowNorm norm;
  Tensor to;

  // From the heads next to each other at `from` to row m.
  template <class Turn>
  void take(const BlockRows& rows, const char* from, int64_t m, const Turn& turn) {
    const int64_t bytes = dim * rows.bytes;
    char* row = static_cast<char*>(to.mutable_data_ptr()) + m * heads * bytes;
    if (norm.is_none() || own < dim) std::copy(from, from + heads * bytes, row);
    if (!norm.is_none()) {
      const int64_t count = heads * own / norm.size(), stride = heads * bytes / count;
      norm.apply(rows.kernels, rows.dtype, from, nullptr, row, count, stride, 0, stride);
    }
    for (int64_t h = 0; h < heads; ++h) turn(row + h * bytes);
  }
};

// From so many rows on, blocks of them go from the norm to the last head while caches have them.
constexpr int64_t kManyRows = 64;

constexpr NormNames kNormQ = {"norm_q", "norm_q_weight", "norm_q_bias", "norm_q_eps"};
constexpr NormNames kNormK = {"norm_k", "norm_k_weight", "norm_k_bias", "norm_k_eps"};

// How many values an RMS norm of heads goes over: those of each, or where its weight is as long,
// of all together.
int64_t normed_values(const std::optional<Tensor>& weight, int64_t heads, int64_t dim,
                      const NormNames& names) {
  if (!weight.has_value()) return dim;
  const int64_t all = heads * dim, given = weight->dim() == 1 ? weight->size(0) : 0;
  const bool fits = given == dim || given == all;
  if (all == dim) {
    check(fits, names.weight, " must have the shape [", dim, "], got ", ShapeOf(*weight));
  }
  check(fits, names.weight, " must have the shape [", dim, "] or [", all, "], got ",
        ShapeOf(*weight));
  return given;
}

// An RMS norm where it has a weight.
RowNorm norm_of_heads(const std::optional<Tensor>& weight, double eps, bool plus_one, int64_t heads,
                      int64_t dim, const NormNames& names) {
  const int64_t n = normed_values(weight, heads, dim, names);
  const Norm given = plus_one ? Norm::rms_plus_one : Norm::rms;
  const Norm norm = weight.has_value() ? given : Norm::none;
  return RowNorm(static_cast<int64_t>(norm), weight, std::nullopt, eps, n, names);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> query_key_value(
    const Tensor& x, const Tensor& packed_q, const Tensor& weight_scale_q,
    const std::optional<Tensor>& bias_q, const std::optional<Tensor>& packed_k,
    const std::optional<Tensor>& weight_scale_k, const std::optional<Tensor>& bias_k,
    const std::optional<Tensor>& packed_v, const std::optional<Tensor>& weight_scale_v,
    const std::optional<Tensor>& bias_v, int64_t heads, int64_t kv_heads,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    const std::optional<Tensor>& norm_q_weight, double norm_q_eps,
    const std::optional<Tensor>& norm_k_weight, double norm_k_eps, int64_t norm_before,
    const std::optional<Tensor>& norm_before_weight, const std::optional<Tensor>& norm_before_bias,
    double norm_before_eps, bool per_token, bool symmetric, int64_t activation_bits,
    bool heads_plus_one, bool interleaved, bool gated) {
  check_sequences(x);
  Int8Product query(packed_q, weight_scale_q, bias_q, kQuery);
  BlockEnds ends(query.k(), query.n(), std::nullopt, norm_before, norm_before_weight,
                 norm_before_bias, norm_before_eps, 0, std::nullopt, std::nullopt, 0.0, per_token,
                 symmetric, activation_bits);
  const BlockRows rows(x, query, query.n(), std::move(ends));
  const QueryKeyValue inputs(x, std::move(query),
                             optional_product(packed_k, weight_scale_k, bias_k, kKey),
                             optional_product(packed_v, weight_scale_v, bias_v, kValue), heads,
                             kv_heads, cos, sin, interleaved, gated);
  const AttentionShape& shape = inputs.shape();
  const auto output = [&](int64_t count, int64_t dim, const std::optional<Tensor>& weight,
                          double eps, const NormNames& names) {
    const int64_t together = dim > shape.dim ? 1 : count;  // gates lie between
    return HeadOutput{count, shape.dim, dim,
                      norm_of_heads(weight, eps, heads_plus_one, together, shape.dim, names),
                      empty({shape.batch, shape.rows, count, dim}, rows.type)};
  };
  HeadOutput q = output(heads, inputs.query_dim(), norm_q_weight, norm_q_eps, kNormQ);
  HeadOutput k = output(kv_heads, shape.dim, norm_k_weight, norm_k_eps, kNormK);
  HeadOutput v = output(kv_heads, shape.dim, std::nullopt, 0.0, {});

  const int64_t m = rows.in.m, width = inputs.width(), bytes = rows.bytes;
  if (m == 0) return {q.to, k.to, v.to};
  const auto take = [&](const char* row, int64_t r) {
    const auto turn = [&](char* head) { inputs.turn_head(rows, head, r); };
    q.take(rows, row, r, turn);
    k.take(rows, row + inputs.key_at() * bytes, r, turn);
    v.take(rows, row + inputs.value_at() * bytes, r, [](char*) {});
  };
  const ProductSize size = inputs.size_with(nullptr);
  const Product& product = product_for(rows.kernels, m, size.n, size.k);
  const int64_t parts = m < kManyRows ? 0 : rows.parts_of_rows(product, size);
  if (parts > 0) {
    run_row_blocks(product, m, parts, (rows.in.k + width) * bytes, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      Pieces pieces(Purpose::block, {count * width * bytes, rows.normed_bytes(count)});
      char* buffer = pieces.next(count * width * bytes);
      const Rows in = rows.begin(begin, count, pieces.next(rows.normed_bytes(count)));
      inputs.multiply_block(product, rows, in, buffer, nullptr);
      for (int64_t r = 0; r < count; ++r) take(buffer + r * width * bytes, begin + r);
    });
  } else {
    with_team(rows.nanoseconds(product, size), [&] {
      Tensor holder = empty({m, width}, rows.type);
      char* buffer = static_cast<char*>(holder.mutable_data_ptr());
      inputs.multiply_all(rows, rows.begin_all(), buffer);
      run_rows(m, width * 4, [&](int64_t r) { take(buffer + r * width * bytes, r); });
    });
  }
  return {q.to, k.to, v.to};
}

}  // namespace dynquant
