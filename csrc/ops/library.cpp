// The schemas of torch.ops.dynquant and their CPU implementations.
#include "../cpu/dispatch.h"
#include "implement.h"

namespace dynquant {

const Kernels& kernels_in_use() {
  const Kernels* kernels = current_kernels();
  check(kernels != nullptr,
        "the environment variable DYNQUANT_ISA names an instruction set that is not supported "
        "here");
  return *kernels;
}

}  // namespace dynquant

STABLE_TORCH_LIBRARY(dynquant, m) {
  m.def("quantize_weight(Tensor weight, bool per_channel=True) -> (Tensor, Tensor)");
  m.def("pack_weight(Tensor qweight) -> Tensor");
  m.def("unpack_weight(Tensor packed, int n, int k) -> Tensor");
  m.def(
      "choose_qparams(Tensor x, bool per_token=True, bool symmetric=False, int bits=8) -> "
      "(Tensor, Tensor)");
  m.def(
      "quantize_activation(Tensor x, bool per_token=True, bool symmetric=False, int bits=8) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "quantize_with(Tensor x, Tensor scale, Tensor zero_point, bool symmetric=False, int bits=8) "
      "-> Tensor");
  m.def("int_mm(Tensor q, Tensor zero_point, Tensor packed, int n) -> Tensor");
  m.def(
      "rescale(Tensor acc, Tensor scale, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> "
      "Tensor");
  m.def(
      "scaled_mm(Tensor q, Tensor scale, Tensor zero_point, Tensor packed, Tensor weight_scale, "
      "Tensor? bias, ScalarType dtype) -> Tensor");
  m.def(
      "linear_dynamic(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, "
      "bool per_token=True, bool symmetric=False, int activation_bits=8) -> Tensor");
  // The same without a gradient: a gradient registered from Python costs a call several
  // microseconds even where none is asked for.
  m.def(
      "linear_dynamic.inference(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, "
      "bool per_token=True, bool symmetric=False, int activation_bits=8) -> Tensor");
  for (const char* overload : {"", ".inference"}) {
    m.def((std::string("conv1d_dynamic") + overload +
           "(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int kernel_size, "
           "int stride=1, int padding_left=0, int padding_right=0, int dilation=1, "
           "bool per_token=True, bool symmetric=False, int activation_bits=8) -> Tensor")
              .c_str());
  }
  m.def(
      "linear_grouped(Tensor x, Tensor counts, Tensor weight, Tensor? weight_scale, Tensor? bias, "
      "int n, bool per_token=True, bool symmetric=False, int activation_bits=8) -> Tensor");
  m.def("quantize_embedding(Tensor weight, int bits=8) -> (Tensor, Tensor)");
  m.def(
      "embedding(Tensor indices, Tensor rows, Tensor qparams, int bits, int dim, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "embedding_bag(Tensor indices, Tensor rows, Tensor qparams, int bits, int dim, "
      "ScalarType dtype, Tensor? offsets=None, Tensor? per_sample_weights=None, int mode=0, "
      "bool include_last_offset=False, int padding_idx=-1) -> Tensor");
  m.def(
      "embedding_sum(Tensor indices, Tensor table, Tensor? type_indices=None, "
      "Tensor? type_table=None, Tensor? position_table=None, int norm=0, "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=0.0) -> Tensor");
  m.def("activation(Tensor x, int function) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor? weight=None, float eps=1e-06, bool plus_one=False) -> Tensor");
  m.def("softmax(Tensor x) -> Tensor");
  const std::string ends =
      "Tensor? residual=None, int norm_before=0, Tensor? norm_before_weight=None, "
      "Tensor? norm_before_bias=None, float norm_before_eps=0., int norm_after=0, "
      "Tensor? norm_after_weight=None, Tensor? norm_after_bias=None, float norm_after_eps=0., "
      "bool per_token=True, bool symmetric=False, int activation_bits=8, "
      "bool residual_last=False";
  const std::string gives = ") -> Tensor";
  m.def(("linear_block(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias=None, "
         "int activation=0, " +
         ends + gives)
            .c_str());
  m.def(("feed_forward(Tensor x, Tensor packed_up, Tensor weight_scale_up, Tensor? bias_up, "
         "Tensor? packed_gate, Tensor? weight_scale_gate, Tensor? bias_gate, Tensor packed_down, "
         "Tensor weight_scale_down, Tensor? bias_down, int activation, int split=0, " +
         ends + gives)
            .c_str());
  m.def(
      "experts(Tensor x, Tensor chosen, Tensor chosen_weights, Tensor weight_up, "
      "Tensor weight_scale_up, Tensor? bias_up, int n_up, Tensor weight_down, "
      "Tensor weight_scale_down, Tensor? bias_down, int n_down, int activation, int split=0, "
      "bool per_token=True, bool symmetric=False, int activation_bits=8) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor");
  m.def(
      "scaled_dot_product(Tensor query, Tensor key, Tensor value, Tensor? mask=None, "
      "Tensor? position_bias=None, bool is_causal=False, float? scale=None, "
      "bool integers=True, Tensor? key_scale=None, Tensor? value_scale=None, "
      "float? softcap=None, Tensor? sinks=None) -> Tensor");
  m.def(
      "relative_attention(Tensor query, Tensor key, Tensor value, Tensor? position_key=None, "
      "Tensor? position_query=None, Tensor? mask=None, float? scale=None, bool integers=True) -> "
      "Tensor");
  m.def(
      "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, "
      "Tensor? state=None, float? scale=None, bool normalize=False) -> (Tensor, Tensor)");
  m.def(
      "gated_delta_rule_(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, "
      "Tensor(a!) state, float? scale=None, bool normalize=False) -> Tensor");
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? state=None) -> (Tensor, Tensor)");
  m.def(
      "selective_scan_(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor(a!) state) -> Tensor");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? state=None, "
      "int activation=0) -> (Tensor, Tensor)");
  m.def(
      "query_key_value(Tensor x, Tensor packed_q, Tensor weight_scale_q, Tensor? bias_q, "
      "Tensor? packed_k, Tensor? weight_scale_k, Tensor? bias_k, Tensor? packed_v, "
      "Tensor? weight_scale_v, Tensor? bias_v, int heads, int kv_heads, Tensor? cos=None, "
      "Tensor? sin=None, Tensor? norm_q_weight=None, float norm_q_eps=0.0, "
      "Tensor? norm_k_weight=None, float norm_k_eps=0.0, int norm_before=0, "
      "Tensor? norm_before_weight=None, Tensor? norm_before_bias=None, "
      "float norm_before_eps=0.0, bool per_token=True, bool symmetric=False, "
      "int activation_bits=8, bool heads_plus_one=False, bool interleaved=False, "
      "bool gated=False) -> (Tensor, Tensor, Tensor)");
  m.def(("attend(Tensor x, Tensor key, Tensor value, Tensor packed_out, Tensor weight_scale_out, "
         "Tensor? bias_out, Tensor? packed_q=None, Tensor? weight_scale_q=None, "
         "Tensor? bias_q=None, Tensor? mask=None, Tensor? position_bias=None, float? scale=None, "
         "Tensor? key_scale=None, Tensor? value_scale=None, " +
         ends +
         ", bool is_causal=False, Tensor? gate=None, float? softcap=None, Tensor? sinks=None" +
         gives)
            .c_str());
  m.def(("attention(Tensor x, Tensor packed_q, Tensor weight_scale_q, Tensor? bias_q, "
         "Tensor? packed_k, Tensor? weight_scale_k, Tensor? bias_k, Tensor? packed_v, "
         "Tensor? weight_scale_v, Tensor? bias_v, Tensor packed_out, Tensor weight_scale_out, "
         "Tensor? bias_out, int heads, int kv_heads, Tensor? mask=None, "
         "Tensor? position_bias=None, bool is_causal=False, float? scale=None, Tensor? cos=None, "
         "Tensor? sin=None, bool integers=True, " +
         ends + ", bool interleaved=False" + gives)
            .c_str());
  m.def(
      "encoder(Tensor x, Tensor?[] weights, int heads, int kv_heads, int activation, float eps, "
      "bool norm_first=False, Tensor? mask=None, bool integers=True, bool per_token=True, "
      "bool symmetric=False, int activation_bits=8) -> Tensor");
  m.def("linear_half(Tensor x, Tensor half_weight, Tensor? bias=None) -> Tensor");
  m.def("linear_half.inference(Tensor x, Tensor half_weight, Tensor? bias=None) -> Tensor");
  constexpr const char* kLstm =
      "(Tensor x, Tensor h0, Tensor c0, Tensor packed_ih, Tensor weight_scale_ih, "
      "Tensor? bias_ih, Tensor packed_hh, Tensor weight_scale_hh, Tensor? bias_hh, "
      "Tensor? packed_hr=None, Tensor? weight_scale_hr=None, Tensor? batch_sizes=None, "
      "bool reverse=False, bool per_token=True, bool symmetric=False, int activation_bits=8) -> "
      "(Tensor, Tensor, Tensor)";
  constexpr const char* kGru =
      "(Tensor x, Tensor h0, Tensor packed_ih, Tensor weight_scale_ih, Tensor? bias_ih, "
      "Tensor packed_hh, Tensor weight_scale_hh, Tensor? bias_hh, Tensor? batch_sizes=None, "
      "bool reverse=False, bool per_token=True, bool symmetric=False, int activation_bits=8) -> "
      "(Tensor, Tensor)";
  constexpr const char* kRnn =
      "(Tensor x, Tensor h0, Tensor packed_ih, Tensor weight_scale_ih, Tensor? bias_ih, "
      "Tensor packed_hh, Tensor weight_scale_hh, Tensor? bias_hh, bool relu=False, "
      "Tensor? batch_sizes=None, bool reverse=False, bool per_token=True, "
      "bool symmetric=False, int activation_bits=8) -> (Tensor, Tensor)";
  constexpr const char* kLstmHalf =
      "(Tensor x, Tensor h0, Tensor c0, Tensor weight_ih, Tensor? bias_ih, Tensor weight_hh, "
      "Tensor? bias_hh, Tensor? weight_hr=None, Tensor? batch_sizes=None, bool reverse=False) -> "
      "(Tensor, Tensor, Tensor)";
  constexpr const char* kGruHalf =
      "(Tensor x, Tensor h0, Tensor weight_ih, Tensor? bias_ih, Tensor weight_hh, "
      "Tensor? bias_hh, Tensor? batch_sizes=None, bool reverse=False) -> (Tensor, Tensor)";
  constexpr const char* kRnnHalf =
      "(Tensor x, Tensor h0, Tensor weight_ih, Tensor? bias_ih, Tensor weight_hh, "
      "Tensor? bias_hh, bool relu=False, Tensor? batch_sizes=None, bool reverse=False) -> "
      "(Tensor, Tensor)";
  constexpr const char* kProducts =
      "Tensor weight_ih, Tensor? weight_scale_ih, Tensor? bias_ih, "
      "Tensor weight_hh, Tensor? weight_scale_hh, Tensor? bias_hh, ";
  constexpr const char* kSequence = "Tensor? batch_sizes=None, bool reverse=False";
  const auto scheme = [](const std::string& part) {
    return ", bool per_token_" + part + "=True, bool symmetric_" + part +
           "=False, int activation_bits_" + part + "=8";
  };
  const std::string schemes = scheme("ih") + scheme("hh");
  const std::string lstm_mixed = std::string("(Tensor x, Tensor h0, Tensor c0, ") + kProducts +
                                 "Tensor? weight_hr=None, Tensor? weight_scale_hr=None, " +
                                 kSequence + schemes + scheme("hr") +
                                 ") -> (Tensor, Tensor, Tensor)";
  const std::string gru_mixed = std::string("(Tensor x, Tensor h0, ") + kProducts + kSequence +
                                schemes + ") -> (Tensor, Tensor)";
  const std::string rnn_mixed = std::string("(Tensor x, Tensor h0, ") + kProducts +
                                "bool relu=False, " + kSequence + schemes + ") -> (Tensor, Tensor)";
  for (const char* overload : {"", ".inference"}) {
    m.def((std::string("lstm_mixed") + overload + lstm_mixed).c_str());
    m.def((std::string("gru_mixed") + overload + gru_mixed).c_str());
    m.def((std::string("rnn_mixed") + overload + rnn_mixed).c_str());
    m.def((std::string("lstm_dynamic") + overload + kLstm).c_str());
    m.def((std::string("gru_dynamic") + overload + kGru).c_str());
    m.def((std::string("rnn_dynamic") + overload + kRnn).c_str());
    m.def((std::string("lstm_half") + overload + kLstmHalf).c_str());
    m.def((std::string("gru_half") + overload + kGruHalf).c_str());
    m.def((std::string("rnn_half") + overload + kRnnHalf).c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  dynquant::Implementations ops(m);
  dynquant::implement(ops);
  ops.add<&dynquant::conv1d_dynamic>("conv1d_dynamic", "conv1d_dynamic.inference");
  ops.add<&dynquant::quantize_embedding>("quantize_embedding");
  ops.add<&dynquant::embedding>("embedding");
  ops.add<&dynquant::embedding_bag>("embedding_bag");
  ops.add<&dynquant::embedding_sum>("embedding_sum");
  ops.add<&dynquant::activation>("activation");
  ops.add<&dynquant::layer_norm>("layer_norm");
  ops.add<&dynquant::rms_norm>("rms_norm");
  ops.add<&dynquant::softmax>("softmax");
  ops.add<&dynquant::linear_block>("linear_block");
  ops.add<&dynquant::feed_forward>("feed_forward");
  ops.add<&dynquant::rotary>("rotary");
  ops.add<&dynquant::experts>("experts");
  ops.add<&dynquant::scaled_dot_product>("scaled_dot_product");
  ops.add<&dynquant::relative_attention>("relative_attention");
  ops.add<&dynquant::gated_delta_rule>("gated_delta_rule");
  ops.add<&dynquant::gated_delta_rule_>("gated_delta_rule_");
  ops.add<&dynquant::selective_scan>("selective_scan");
  ops.add<&dynquant::selective_scan_>("selective_scan_");
  ops.add<&dynquant::causal_conv1d>("causal_conv1d");
  ops.add<&dynquant::query_key_value>("query_key_value");
  ops.add<&dynquant::attend>("attend");
  ops.add<&dynquant::attention>("attention");
  ops.add<&dynquant::encoder>("encoder");
  ops.add<&dynquant::linear_half>("linear_half", "linear_half.inference");
  ops.add<&dynquant::lstm_dynamic>("lstm_dynamic", "lstm_dynamic.inference");
  ops.add<&dynquant::gru_dynamic>("gru_dynamic", "gru_dynamic.inference");
  ops.add<&dynquant::rnn_dynamic>("rnn_dynamic", "rnn_dynamic.inference");
  ops.add<&dynquant::lstm_half>("lstm_half", "lstm_half.inference");
  ops.add<&dynquant::gru_half>("gru_half", "gru_half.inference");
  ops.add<&dynquant::rnn_half>("rnn_half", "rnn_half.inference");
  ops.add<&dynquant::lstm_mixed>("lstm_mixed", "lstm_mixed.inference");
  ops.add<&dynquant::gru_mixed>("gru_mixed", "gru_mixed.inference");
  ops.add<&dynquant::rnn_mixed>("rnn_mixed", "rnn_mixed.inference");
}
