// choose_qparams, quantize_activation and quantize_with on CUDA.
#include "../cuda/calls.inl.h"
#include "cuda_call.h"
#include "cuda_rows.h"
#include "ops.h"

namespace dynquant {
namespace {

Rule rule_of(bool symmetric) { return symmetric ? Rule::symmetric : Rule::asymmetric; }

Tensor empty_q(const Tensor& x, int64_t k, bool symmetric) {
  return empty(leading_shape(x, k), symmetric ? ScalarType::Char : ScalarType::Byte);
}

// Scale and zero point, and the bytes where `q` is given.
std::tuple<Tensor, Tensor> quantize_rows(const CudaCall& call, const Tensor& x, bool per_token,
                                         bool symmetric, Tensor* q) {
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const std::vector<int64_t> shape = per_token ? leading_shape(x, -1) : std::vector<int64_t>{1};
  Tensor scale = empty(shape, ScalarType::Float), zero_point = empty(shape, ScalarType::Int);
  QuantizeRowsArgs a = {};
  a.rows = rows_args(rows);
  a.rule = rule_of(symmetric);
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  a.zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  if (q != nullptr) {
    *q = empty_q(x, rows.k, symmetric);
    a.q = static_cast<uint8_t*>(q->mutable_data_ptr());
    a.q_stride = a.q_bytes = rows.k;
  }
  CudaMemory memory;
  if (!per_token) {
    memory.take(kMostRanges, sizeof(Range));
    memory.allocate();
  }
  quantize(call.stream(), dtype, a, per_token ? Parameters::own : Parameters::whole,
           memory.at<Range>(0));
  call.check_launches();
  return {scale, zero_point};
}

}  // namespace

std::tuple<Tensor, Tensor> choose_qparams(const Tensor& x, bool per_token, bool symmetric,
                                          int64_t bits) {
  check_cuda_bits("bits", bits);
  const CudaCall call(x, "x");
  return quantize_rows(call, x, per_token, symmetric, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, bool per_token,
                                                       bool symmetric, int64_t bits) {
  check_cuda_bits("bits", bits);
  const CudaCall call(x, "x");
  Tensor q;
  const auto [scale, zero_point] = quantize_rows(call, x, per_token, symmetric, &q);
  return {q, scale, zero_point};
}

Tensor quantize_with(const Tensor& x, const Tensor& scale, const Tensor& zero_point, bool symmetric,
                     int64_t bits) {
  check_cuda_bits("bits", bits);
  const CudaCall call(x, "x");
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const PerRow scales = per_row(scale, "scale", ScalarType::Float, x);
  const PerRow zero_points = per_row(zero_point, "zero_point", ScalarType::Int, x);
  Tensor q = empty_q(x, rows.k, symmetric);
  QuantizeRowsArgs a = {};
  a.rows = rows_args(rows);
  a.rule = rule_of(symmetric);
  a.given_scale = row_values<float>(scales);
  a.given_zero_point = row_values<int32_t>(zero_points);
  a.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  a.q_stride = a.q_bytes = rows.k;
  if (rows.m > 0 && rows.k > 0) {
    quantize(call.stream(), dtype, a, Parameters::given, nullptr);
  }
  call.check_launches();
  return q;
}

}  // namespace dynquant
