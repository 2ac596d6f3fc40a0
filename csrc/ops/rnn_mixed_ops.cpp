// lstm_mixed, gru_mixed and rnn_mixed: recurrent layers in which each product has its own kind
// of weight and its own way to quantize the activations.
#include "recurrence.h"

namespace dynquant {
namespace {

// What messages call the arguments of one product.
struct ProductNames {
  ColumnNames columns;
  const char* bits;
};

constexpr ProductNames kInput = {{"weight_ih", "weight_scale_ih", "bias_ih"}, "activation_bits_ih"};
constexpr ProductNames kHidden = {{"weight_hh", "weight_scale_hh", "bias_hh"},
                                  "activation_bits_hh"};
constexpr ProductNames kProjection = {{"weight_hr", "weight_scale_hr", "bias_hr"},
                                      "activation_bits_hr"};

LayerProduct product_of(const Tensor& weight, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& bias, bool per_token, bool symmetric,
                        int64_t bits, const ProductNames& names) {
  const ActivationScheme scheme(per_token, symmetric, bits, names.bits);
  if (!scale.has_value()) return {weight, bias, true, names.columns};
  return {weight, *scale, bias, scheme, names.columns};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_mixed(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
    const std::optional<Tensor>& weight_scale_ih, const std::optional<Tensor>& bias_ih,
    const Tensor& weight_hh, const std::optional<Tensor>& weight_scale_hh,
    const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr,
    const std::optional<Tensor>& weight_scale_hr, const std::optional<Tensor>& batch_sizes,
    bool reverse, bool per_token_ih, bool symmetric_ih, int64_t activation_bits_ih,
    bool per_token_hh, bool symmetric_hh, int64_t activation_bits_hh, bool per_token_hr,
    bool symmetric_hr, int64_t activation_bits_hr) {
  check(weight_hr.has_value() || !weight_scale_hr.has_value(),
        "weight_scale_hr must be None where weight_hr is None");
  std::optional<LayerProduct> projection;
  if (weight_hr.has_value()) {
    projection.emplace(product_of(*weight_hr, weight_scale_hr, std::nullopt, per_token_hr,
                                  symmetric_hr, activation_bits_hr, kProjection));
  }
  return run_lstm(x, h0, c0,
                  product_of(weight_ih, weight_scale_ih, bias_ih, per_token_ih, symmetric_ih,
                             activation_bits_ih, kInput),
                  product_of(weight_hh, weight_scale_hh, bias_hh, per_token_hh, symmetric_hh,
                             activation_bits_hh, kHidden),
                  std::move(projection), batch_sizes, reverse);
}

std::tuple<Tensor, Tensor> gru_mixed(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                     const std::optional<Tensor>& weight_scale_ih,
                                     const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                     const std::optional<Tensor>& weight_scale_hh,
                                     const std::optional<Tensor>& bias_hh,
                                     const std::optional<Tensor>& batch_sizes, bool reverse,
                                     bool per_token_ih, bool symmetric_ih,
                                     int64_t activation_bits_ih, bool per_token_hh,
                                     bool symmetric_hh, int64_t activation_bits_hh) {
  return run_plain(Cell::gru, x, h0,
                   product_of(weight_ih, weight_scale_ih, bias_ih, per_token_ih, symmetric_ih,
                              activation_bits_ih, kInput),
                   product_of(weight_hh, weight_scale_hh, bias_hh, per_token_hh, symmetric_hh,
                              activation_bits_hh, kHidden),
                   batch_sizes, reverse);
}

std::tuple<Tensor, Tensor> rnn_mixed(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                     const std::optional<Tensor>& weight_scale_ih,
                                     const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                     const std::optional<Tensor>& weight_scale_hh,
                                     const std::optional<Tensor>& bias_hh, bool relu,
                                     const std::optional<Tensor>& batch_sizes, bool reverse,
                                     bool per_token_ih, bool symmetric_ih,
                                     int64_t activation_bits_ih, bool per_token_hh,
                                     bool symmetric_hh, int64_t activation_bits_hh) {
  return run_plain(relu ? Cell::rnn_relu : Cell::rnn_tanh, x, h0,
                   product_of(weight_ih, weight_scale_ih, bias_ih, per_token_ih, symmetric_ih,
                              activation_bits_ih, kInput),
                   product_of(weight_hh, weight_scale_hh, bias_hh, per_token_hh, symmetric_hh,
                              activation_bits_hh, kHidden),
                   batch_sizes, reverse);
}

}  // namespace dynquant
