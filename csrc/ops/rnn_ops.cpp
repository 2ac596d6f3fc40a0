// lstm_dynamic, gru_dynamic and rnn_dynamic: recurrent layers with int8 weights.
#include "activation.h"
#include "gemm_driver.h"
#include "recurrence.h"

namespace dynquant {
namespace {

// A packed weight with the epilogue of its products.
struct Int8Product {
  const char* name;
  Packed weight;
  Columns columns;

  Int8Product(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
              const ColumnNames& names)
      : name(names.packed),
        weight(check_packed(packed, names.packed)),
        columns(scale, bias, weight.n, names) {
    columns.args.out_dtype = Dtype::f32;
    columns.args.out_stride = weight.n;
  }

  int64_t n() const { return weight.n; }
  int64_t k() const { return weight.k; }
};

constexpr ColumnNames kInputNames = {"packed_ih", "weight_scale_ih", "bias_ih"};
constexpr ColumnNames kHiddenNames = {"packed_hh", "weight_scale_hh", "bias_hh"};
constexpr ColumnNames kProjectionNames = {"packed_hr", "weight_scale_hr", "bias_hr"};

// Rows are quantized, each on its own or all of them alike.
struct Int8Scheme {
  using Product = Int8Product;
  using Whole = std::optional<QParams>;

  bool per_token;
  bool symmetric;

  Whole whole(const Kernels& kernels, const Rows& rows, Dtype dtype) const {
    if (per_token) return std::nullopt;
    return choose_qparams(range_of_rows(kernels, rows, dtype), symmetric);
  }

  void multiply(const Kernels& kernels, const Rows& rows, Dtype dtype, const Whole& whole,
                const Product& by, float* out) const {
    EpilogueArgs epilogue = by.columns.args;
    epilogue.out = out;
    const FloatRows source{kernels, rows, dtype, symmetric, whole};
    dynquant::multiply(kernels, source, rows.m, by.weight, epilogue, sizeof(float));
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_dynamic(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& packed_ih,
    const Tensor& weight_scale_ih, const std::optional<Tensor>& bias_ih, const Tensor& packed_hh,
    const Tensor& weight_scale_hh, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& packed_hr, const std::optional<Tensor>& weight_scale_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse, bool per_token, bool symmetric) {
  check(packed_hr.has_value() == weight_scale_hr.has_value(),
        "packed_hr and weight_scale_hr must both be given or neither");
  std::optional<Int8Product> projection;
  if (packed_hr.has_value()) {
    projection.emplace(*packed_hr, *weight_scale_hr, std::nullopt, kProjectionNames);
  }
  return run_lstm<Int8Scheme>(x, h0, c0, {packed_ih, weight_scale_ih, bias_ih, kInputNames},
                              {packed_hh, weight_scale_hh, bias_hh, kHiddenNames},
                              std::move(projection), batch_sizes, reverse, {per_token, symmetric});
}

std::tuple<Tensor, Tensor> gru_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric) {
  return run_plain<Int8Scheme>(Cell::gru, x, h0, {packed_ih, weight_scale_ih, bias_ih, kInputNames},
                               {packed_hh, weight_scale_hh, bias_hh, kHiddenNames}, batch_sizes,
                               reverse, {per_token, symmetric});
}

std::tuple<Tensor, Tensor> rnn_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh, bool relu,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric) {
  return run_plain<Int8Scheme>(relu ? Cell::rnn_relu : Cell::rnn_tanh, x, h0,
                               {packed_ih, weight_scale_ih, bias_ih, kInputNames},
                               {packed_hh, weight_scale_hh, bias_hh, kHiddenNames}, batch_sizes,
                               reverse, {per_token, symmetric});
}

}  // namespace dynquant
