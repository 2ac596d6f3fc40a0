// lstm_dynamic, gru_dynamic and rnn_dynamic: recurrent layers with int8 weights.
#include "recurrence.h"

namespace dynquant {
namespace {

constexpr ColumnNames kInputNames = {"packed_ih", "weight_scale_ih", "bias_ih"};
constexpr ColumnNames kHiddenNames = {"packed_hh", "weight_scale_hh", "bias_hh"};
constexpr ColumnNames kProjectionNames = {"packed_hr", "weight_scale_hr", "bias_hr"};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_dynamic(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& packed_ih,
    const Tensor& weight_scale_ih, const std::optional<Tensor>& bias_ih, const Tensor& packed_hh,
    const Tensor& weight_scale_hh, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& packed_hr, const std::optional<Tensor>& weight_scale_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse, bool per_token, bool symmetric,
    int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  check(packed_hr.has_value() == weight_scale_hr.has_value(),
        "packed_hr and weight_scale_hr must both be given or neither");
  std::optional<LayerProduct> projection;
  if (packed_hr.has_value()) {
    projection.emplace(*packed_hr, *weight_scale_hr, std::nullopt, scheme, kProjectionNames);
  }
  return run_lstm(x, h0, c0, {packed_ih, weight_scale_ih, bias_ih, scheme, kInputNames},
                  {packed_hh, weight_scale_hh, bias_hh, scheme, kHiddenNames},
                  std::move(projection), batch_sizes, reverse);
}

std::tuple<Tensor, Tensor> gru_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric, int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  return run_plain(Cell::gru, x, h0, {packed_ih, weight_scale_ih, bias_ih, scheme, kInputNames},
                   {packed_hh, weight_scale_hh, bias_hh, scheme, kHiddenNames}, batch_sizes,
                   reverse);
}

std::tuple<Tensor, Tensor> rnn_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh, bool relu,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric, int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  return run_plain(relu ? Cell::rnn_relu : Cell::rnn_tanh, x, h0,
                   {packed_ih, weight_scale_ih, bias_ih, scheme, kInputNames},
                   {packed_hh, weight_scale_hh, bias_hh, scheme, kHiddenNames}, batch_sizes,
                   reverse);
}

}  // namespace dynquant
