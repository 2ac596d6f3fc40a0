// lstm_half, gru_half and rnn_half: recurrent layers with weights in 16 bits.
#include "recurrence.h"

namespace dynquant {
namespace {

LayerProduct input_product(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {weight, bias, false, {"weight_ih", nullptr, "bias_ih"}};
}

LayerProduct hidden_product(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {weight, bias, false, {"weight_hh", nullptr, "bias_hh"}};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_half(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
    const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse) {
  std::optional<LayerProduct> projection;
  if (weight_hr.has_value()) {
    projection.emplace(*weight_hr, std::nullopt, false,
                       ColumnNames{"weight_hr", nullptr, "bias_hr"});
  }
  return run_lstm(x, h0, c0, input_product(weight_ih, bias_ih), hidden_product(weight_hh, bias_hh),
                  std::move(projection), batch_sizes, reverse);
}

std::tuple<Tensor, Tensor> gru_half(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                    const std::optional<Tensor>& bias_hh,
                                    const std::optional<Tensor>& batch_sizes, bool reverse) {
  return run_plain(Cell::gru, x, h0, input_product(weight_ih, bias_ih),
                   hidden_product(weight_hh, bias_hh), batch_sizes, reverse);
}

std::tuple<Tensor, Tensor> rnn_half(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                    const std::optional<Tensor>& bias_hh, bool relu,
                                    const std::optional<Tensor>& batch_sizes, bool reverse) {
  return run_plain(relu ? Cell::rnn_relu : Cell::rnn_tanh, x, h0, input_product(weight_ih, bias_ih),
                   hidden_product(weight_hh, bias_hh), batch_sizes, reverse);
}

}  // namespace dynquant
