// lstm_half, gru_half and rnn_half: recurrent layers with weights in 16 bits.
#include "half_matmul.h"
#include "recurrence.h"

namespace dynquant {
namespace {

struct HalfProduct {
  const char* name;
  HalfWeight weight;
  FloatBias bias;

  HalfProduct(const char* weight_name, const Tensor& weight_, const char* bias_name,
              const std::optional<Tensor>& bias_)
      : name(weight_name),
        weight(check_half_weight(weight_, weight_name)),
        bias(bias_, weight.n, bias_name) {}

  int64_t n() const { return weight.n; }
  int64_t k() const { return weight.k; }
};

struct HalfScheme {
  using Product = HalfProduct;
  struct Whole {};

  Whole whole(const Kernels&, const Rows&, Dtype) const { return {}; }

  void multiply(const Kernels& kernels, const Rows& rows, Dtype dtype, Whole, const Product& by,
                float* out) const {
    half_matmul(kernels, {rows.data, dtype, rows.m, rows.stride}, by.weight, by.bias.data, out,
                Dtype::f32, by.weight.n);
  }
};

HalfProduct input_product(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {"weight_ih", weight, "bias_ih", bias};
}

HalfProduct hidden_product(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {"weight_hh", weight, "bias_hh", bias};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_half(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
    const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse) {
  std::optional<HalfProduct> projection;
  if (weight_hr.has_value()) projection.emplace("weight_hr", *weight_hr, "bias_hr", std::nullopt);
  return run_lstm<HalfScheme>(x, h0, c0, input_product(weight_ih, bias_ih),
                              hidden_product(weight_hh, bias_hh), std::move(projection),
                              batch_sizes, reverse, {});
}

std::tuple<Tensor, Tensor> gru_half(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                    const std::optional<Tensor>& bias_hh,
                                    const std::optional<Tensor>& batch_sizes, bool reverse) {
  return run_plain<HalfScheme>(Cell::gru, x, h0, input_product(weight_ih, bias_ih),
                               hidden_product(weight_hh, bias_hh), batch_sizes, reverse, {});
}

std::tuple<Tensor, Tensor> rnn_half(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                    const std::optional<Tensor>& bias_hh, bool relu,
                                    const std::optional<Tensor>& batch_sizes, bool reverse) {
  return run_plain<HalfScheme>(relu ? Cell::rnn_relu : Cell::rnn_tanh, x, h0,
                               input_product(weight_ih, bias_ih),
                               hidden_product(weight_hh, bias_hh), batch_sizes, reverse, {});
}

}  // namespace dynquant
