// attend: an attention for keys and values that are there already, a cache's, to the residual and
// the norm behind its output projection.
#include "linear_block.h"
#include "query_key_value.h"

namespace dynquant {
namespace {

// What the heads give, in place, times the sigmoid of their gates.
void multiply_by_gates(const Tensor& attended, const HeadsOf& gate) {
  const Kernels& kernels = kernels_in_use();
  const int64_t bytes = gate.dim * bytes_of(gate.dtype);
  char* first = static_cast<char*>(attended.mutable_data_ptr());
  run_rows(gate.batch * gate.rows, gate.count * gate.dim * kExpCost, [&](int64_t m) {
    for (int64_t h = 0; h < gate.count; ++h) {
      char* head = first + (m * gate.count + h) * bytes;
      const char* by = gate.heads.at(m / gate.rows, m % gate.rows, h);
      kernels.activate({Activation::sigmoid, gate.dtype, by, head, gate.dim, head});
    }
  });
}

}  // namespace

Tensor attend(const Tensor& x, const Tensor& key, const Tensor& value, const Tensor& packed_out,
              const Tensor& weight_scale_out, const std::optional<Tensor>& bias_out,
              const std::optional<Tensor>& packed_q, const std::optional<Tensor>& weight_scale_q,
              const std::optional<Tensor>& bias_q, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& position_bias, std::optional<double> scale,
              const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
              const std::optional<Tensor>& residual, int64_t norm_before,
              const std::optional<Tensor>& norm_before_weight,
              const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
              int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
              const std::optional<Tensor>& norm_after_bias, double norm_after_eps, bool per_token,
              bool symmetric, int64_t activation_bits, bool residual_last, bool is_causal,
              const std::optional<Tensor>& gate, std::optional<double> softcap,
              const std::optional<Tensor>& sinks) {
  std::optional<Int8Product> projection =
      optional_product(packed_q, weight_scale_q, bias_q, kQuery);
  Int8Product out(packed_out, weight_scale_out, bias_out, kOut);
  constexpr int64_t kNone = 0;
  BlockEnds behind(out.k(), out.n(), residual, kNone, std::nullopt, std::nullopt, 0.0, norm_after,
                   norm_after_weight, norm_after_bias, norm_after_eps, per_token, symmetric,
                   activation_bits, residual_last);
  check_float(x, "x");
  check(x.dim() >= 2, "x must have the dimensions [B, L, ...], got ", ShapeOf(x));
  if (residual.has_value()) checked_residual(*residual, x, {x.size(0), x.size(1), out.n()});
  const auto check_out = [&](int64_t k) {
    check(out.k() == k, "packed_out must have K = ", k, ", from the heads of the query, got ",
          out.k());
  };
  constexpr HeadsOf::Order kOrder = HeadsOf::Order::heads_first;
  const KeptHeads keys(key, key_scale, "key", "key_scale", kOrder);
  const KeptHeads values(value, value_scale, "value", "value_scale", kOrder);
  const auto query = [&] {
    if (!projection.has_value()) {
      const HeadsOf given(x, "x");
      const RowNorm none(norm_before, norm_before_weight, norm_before_bias, norm_before_eps,
                         given.dim, kNormBefore);
      check(none.is_none(), "norm_before belongs to packed_q, which is not given, got ",
            norm_before);
      check_out(given.count * given.dim);
      return given;
    }
    check_sequences(x);
    BlockEnds before(projection->k(), projection->n(), std::nullopt, norm_before,
                     norm_before_weight, norm_before_bias, norm_before_eps, kNone, std::nullopt,
                     std::nullopt, 0.0, per_token, symmetric, activation_bits);
    const int64_t n = projection->n();
    check(keys.dim > 0 && n % keys.dim == 0, "packed_q must have N, a multiple of D = ", keys.dim,
          ", that of key, got ", n);
    check_out(n);
    return HeadsOf(linear_block(x, *std::move(projection), kNone, std::move(before)), keys.dim);
  }();
  std::optional<HeadsOf> gates;
  if (gate.has_value()) {
    check_tensor(*gate, "gate", {x.scalar_type()});
    check_shape(*gate, "gate", {query.batch, query.rows, query.count, query.dim});
    gates.emplace(*gate, "gate");
  }
  const Tensor heads = attended(query, keys, values, mask, position_bias, is_causal, scale, false,
                                softcap, sinks, {query.batch, query.rows, query.count * query.dim});
  if (gates.has_value()) multiply_by_gates(heads, *gates);
  return linear_block(heads, std::move(out), kNone, std::move(behind));
}

}  // namespace dynquant
