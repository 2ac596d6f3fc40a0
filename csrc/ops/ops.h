// The ops of torch.ops.dynquant; library.cpp gives their schemas. libdynquant defines them for the
// CPU, libdynquant_cuda (the cuda_*.cpp files) once more for CUDA.
#pragma once

#include <tuple>

#include "../cpu/kernels.h"
#include "tensors.h"

namespace dynquant {

// The kernels in use; an error where DYNQUANT_ISA forces a set that cannot run here.
const Kernels& kernels_in_use();

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, bool per_channel);
Tensor pack_weight(const Tensor& qweight);
Tensor unpack_weight(const Tensor& packed, int64_t n, int64_t k);

std::tuple<Tensor, Tensor> choose_qparams(const Tensor& x, bool per_token, bool symmetric,
                                          int64_t bits);
std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, bool per_token,
                                                       bool symmetric, int64_t bits);
Tensor quantize_with(const Tensor& x, const Tensor& scale, const Tensor& zero_point, bool symmetric,
                     int64_t bits);

Tensor int_mm(const Tensor& q, const Tensor& zero_point, const Tensor& packed, int64_t n);
Tensor rescale(const Tensor& acc, const Tensor& scale, const Tensor& weight_scale,
               const std::optional<Tensor>& bias, ScalarType dtype);
Tensor scaled_mm(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                 const Tensor& packed, const Tensor& weight_scale,
                 const std::optional<Tensor>& bias, ScalarType dtype);
Tensor linear_dynamic(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, bool per_token, bool symmetric,
                      int64_t activation_bits);
Tensor conv1d_dynamic(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, int64_t kernel_size, int64_t stride,
                      int64_t padding_left, int64_t padding_right, int64_t dilation, bool per_token,
                      bool symmetric, int64_t activation_bits);

Tensor linear_grouped(const Tensor& x, const Tensor& counts, const Tensor& weight,
                      const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& bias,
                      int64_t n, bool per_token, bool symmetric, int64_t activation_bits);

Activation check_activation(int64_t function, const char* name);
Tensor activation(const Tensor& x, int64_t function);
Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps);
Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps, bool plus_one);
Tensor softmax(const Tensor& x);
Tensor linear_block(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias, int64_t activation,
                    const std::optional<Tensor>& residual, int64_t norm_before,
                    const std::optional<Tensor>& norm_before_weight,
                    const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
                    int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
                    const std::optional<Tensor>& norm_after_bias, double norm_after_eps,
                    bool per_token, bool symmetric, int64_t activation_bits, bool residual_last);
Tensor feed_forward(const Tensor& x, const Tensor& packed_up, const Tensor& weight_scale_up,
                    const std::optional<Tensor>& bias_up, const std::optional<Tensor>& packed_gate,
                    const std::optional<Tensor>& weight_scale_gate,
                    const std::optional<Tensor>& bias_gate, const Tensor& packed_down,
                    const Tensor& weight_scale_down, const std::optional<Tensor>& bias_down,
                    int64_t activation, int64_t split, const std::optional<Tensor>& residual,
                    int64_t norm_before, const std::optional<Tensor>& norm_before_weight,
                    const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
                    int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
                    const std::optional<Tensor>& norm_after_bias, double norm_after_eps,
                    bool per_token, bool symmetric, int64_t activation_bits, bool residual_last);

Tensor experts(const Tensor& x, const Tensor& chosen, const Tensor& chosen_weights,
               const Tensor& weight_up, const Tensor& weight_scale_up,
               const std::optional<Tensor>& bias_up, int64_t n_up, const Tensor& weight_down,
               const Tensor& weight_scale_down, const std::optional<Tensor>& bias_down,
               int64_t n_down, int64_t activation, int64_t split, bool per_token, bool symmetric,
               int64_t activation_bits);

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved);
Tensor scaled_dot_product(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& position_bias, bool is_causal,
                          std::optional<double> scale, bool integers,
                          const std::optional<Tensor>& key_scale,
                          const std::optional<Tensor>& value_scale, std::optional<double> softcap,
                          const std::optional<Tensor>& sinks);
Tensor relative_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& position_key,
                          const std::optional<Tensor>& position_query,
                          const std::optional<Tensor>& mask, std::optional<double> scale,
                          bool integers);
std::tuple<Tensor, Tensor> gated_delta_rule(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& decay,
                                            const Tensor& beta, const std::optional<Tensor>& state,
                                            std::optional<double> scale, bool normalize);
Tensor gated_delta_rule_(const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& decay, const Tensor& beta, const Tensor& state,
                         std::optional<double> scale, bool normalize);
std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A,
                                          const Tensor& B, const Tensor& C,
                                          const std::optional<Tensor>& D,
                                          const std::optional<Tensor>& state);
Tensor selective_scan_(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                       const Tensor& C, const std::optional<Tensor>& D, const Tensor& state);
std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& state, int64_t activation);
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
    bool heads_plus_one, bool interleaved, bool gated);
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
              const std::optional<Tensor>& sinks);
Tensor attention(
    const Tensor& x, const Tensor& packed_q, const Tensor& weight_scale_q,
    const std::optional<Tensor>& bias_q, const std::optional<Tensor>& packed_k,
    const std::optional<Tensor>& weight_scale_k, const std::optional<Tensor>& bias_k,
    const std::optional<Tensor>& packed_v, const std::optional<Tensor>& weight_scale_v,
    const std::optional<Tensor>& bias_v, const Tensor& packed_out, const Tensor& weight_scale_out,
    const std::optional<Tensor>& bias_out, int64_t heads, int64_t kv_heads,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias, bool is_causal,
    std::optional<double> scale, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    bool integers, const std::optional<Tensor>& residual, int64_t norm_before,
    const std::optional<Tensor>& norm_before_weight, const std::optional<Tensor>& norm_before_bias,
    double norm_before_eps, int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
    const std::optional<Tensor>& norm_after_bias, double norm_after_eps, bool per_token,
    bool symmetric, int64_t activation_bits, bool residual_last, bool interleaved);
Tensor encoder(const Tensor& x, const std::vector<std::optional<Tensor>>& weights, int64_t heads,
               int64_t kv_heads, int64_t activation, double eps, bool norm_first,
               const std::optional<Tensor>& mask, bool integers, bool per_token, bool symmetric,
               int64_t activation_bits);

Tensor linear_half(const Tensor& x, const Tensor& half_weight, const std::optional<Tensor>& bias);

std::tuple<Tensor, Tensor> quantize_embedding(const Tensor& weight, int64_t bits);
Tensor embedding(const Tensor& indices, const Tensor& rows, const Tensor& qparams, int64_t bits,
                 int64_t dim, ScalarType dtype);
Tensor embedding_bag(const Tensor& indices, const Tensor& rows, const Tensor& qparams, int64_t bits,
                     int64_t dim, ScalarType dtype, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& per_sample_weights, int64_t mode,
                     bool include_last_offset, int64_t padding_idx);
Tensor embedding_sum(const Tensor& indices, const Tensor& table,
                     const std::optional<Tensor>& type_indices,
                     const std::optional<Tensor>& type_table,
                     const std::optional<Tensor>& position_table, int64_t norm,
                     const std::optional<Tensor>& norm_weight,
                     const std::optional<Tensor>& norm_bias, double norm_eps);
std::tuple<Tensor, Tensor, Tensor> lstm_dynamic(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& packed_ih,
    const Tensor& weight_scale_ih, const std::optional<Tensor>& bias_ih, const Tensor& packed_hh,
    const Tensor& weight_scale_hh, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& packed_hr, const std::optional<Tensor>& weight_scale_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse, bool per_token, bool symmetric,
    int64_t activation_bits);
std::tuple<Tensor, Tensor> gru_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric, int64_t activation_bits);
std::tuple<Tensor, Tensor> rnn_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh, bool relu,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric, int64_t activation_bits);

std::tuple<Tensor, Tensor, Tensor> lstm_half(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
    const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse);
std::tuple<Tensor, Tensor> gru_half(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                    const std::optional<Tensor>& bias_hh,
                                    const std::optional<Tensor>& batch_sizes, bool reverse);
std::tuple<Tensor, Tensor> rnn_half(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                    const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                    const std::optional<Tensor>& bias_hh, bool relu,
                                    const std::optional<Tensor>& batch_sizes, bool reverse);

// Each of their products has its own kind of weight: packed int8 with a scale, or without one
// [N, K] in fp32, bf16 or fp16; and its own scheme for the activations.
std::tuple<Tensor, Tensor, Tensor> lstm_mixed(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih,
    const std::optional<Tensor>& weight_scale_ih, const std::optional<Tensor>& bias_ih,
    const Tensor& weight_hh, const std::optional<Tensor>& weight_scale_hh,
    const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& weight_hr,
    const std::optional<Tensor>& weight_scale_hr, const std::optional<Tensor>& batch_sizes,
    bool reverse, bool per_token_ih, bool symmetric_ih, int64_t activation_bits_ih,
    bool per_token_hh, bool symmetric_hh, int64_t activation_bits_hh, bool per_token_hr,
    bool symmetric_hr, int64_t activation_bits_hr);
std::tuple<Tensor, Tensor> gru_mixed(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                     const std::optional<Tensor>& weight_scale_ih,
                                     const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                     const std::optional<Tensor>& weight_scale_hh,
                                     const std::optional<Tensor>& bias_hh,
                                     const std::optional<Tensor>& batch_sizes, bool reverse,
                                     bool per_token_ih, bool symmetric_ih,
                                     int64_t activation_bits_ih, bool per_token_hh,
                                     bool symmetric_hh, int64_t activation_bits_hh);
std::tuple<Tensor, Tensor> rnn_mixed(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                     const std::optional<Tensor>& weight_scale_ih,
                                     const std::optional<Tensor>& bias_ih, const Tensor& weight_hh,
                                     const std::optional<Tensor>& weight_scale_hh,
                                     const std::optional<Tensor>& bias_hh, bool relu,
                                     const std::optional<Tensor>& batch_sizes, bool reverse,
                                     bool per_token_ih, bool symmetric_ih,
                                     int64_t activation_bits_ih, bool per_token_hh,
                                     bool symmetric_hh, int64_t activation_bits_hh);

}  // namespace dynquant
