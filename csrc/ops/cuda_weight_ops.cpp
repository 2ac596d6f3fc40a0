// quantize_weight, pack_weight and unpack_weight on CUDA. The first two refuse values, for which
// they wait for the device; they run once for a weight.
#include "../cuda/calls.inl.h"
#include "cuda_call.h"
#include "cuda_packed.h"
#include "cuda_rows.h"
#include "ops.h"

namespace dynquant {
namespace {

void check_packed_form(const Tensor& packed) {
  check_tensor(packed, "packed", {ScalarType::Char});
  check(packed.dim() == 1 && packed.is_contiguous(),
        "packed must be the contiguous one-dimensional tensor that pack_weight gives, got shape ",
        ShapeOf(packed));
}

Tensor aligned(const Tensor& packed) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0;
  return is_aligned ? packed : torch::stable::clone(packed);
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, bool per_channel) {
  const CudaCall call(weight, "weight");
  call.check_not_capturing("quantize_weight");
  const Dtype dtype = check_float(weight, "weight");
  check_weight_shape(weight, "weight");
  const Rows rows = rows_of(weight, "weight");
  Tensor q = empty({rows.m, rows.k}, ScalarType::Char);
  Tensor scale = empty({per_channel ? rows.m : 1}, ScalarType::Float);
  Tensor refused = call.new_flag();
  CudaMemory memory;
  memory.take(kMostRanges, sizeof(Range));
  memory.allocate();
  QuantizeRowsArgs a = {};
  a.rows = rows_args(rows);
  a.rule = Rule::weight;
  a.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  a.q_stride = a.q_bytes = rows.k;
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  a.refused = static_cast<int32_t*>(refused.mutable_data_ptr());
  quantize(call.stream(), dtype, a, per_channel ? Parameters::own : Parameters::whole,
           memory.at<Range>(0));
  call.check_launches();
  check(call.read(refused) == 0, "weight holds NaN or Inf, which int8 cannot");
  return {q, scale};
}

Tensor pack_weight(const Tensor& qweight) {
  const CudaCall call(qweight, "qweight");
  call.check_not_capturing("pack_weight");
  check_tensor(qweight, "qweight", {ScalarType::Char});
  check_weight_shape(qweight, "qweight");
  const Rows rows = rows_of(qweight, "qweight");
  Tensor packed = empty({packed_bytes(rows.m, rows.k)}, ScalarType::Char);
  Tensor refused = call.new_flag();
  PackArgs a = {};
  a.weight = reinterpret_cast<const int8_t*>(rows.data);
  a.stride = rows.stride;
  a.n = rows.m;
  a.k = rows.k;
  a.packed = static_cast<int8_t*>(packed.mutable_data_ptr());
  a.refused = static_cast<int32_t*>(refused.mutable_data_ptr());
  pack(call.stream(), a);
  call.check_launches();
  check(call.read(refused) == 0, "qweight holds -128; symmetric int8 weights lie in [-127, 127]");
  return packed;
}

CudaPacked packed_of_depth(const Tensor& packed, int64_t k, const char* name) {
  check_packed_form(packed);
  check(k <= kMaxK, name, " has K = ", k, ", more than ", kMaxK);
  const int64_t bytes = packed.numel();
  const int64_t n = bytes < kHeaderBytes ? -1 : columns_of(bytes, k);
  check(n >= 0 && n < kMaxN && bytes == packed_bytes(n, k), "packed has ", bytes,
        " bytes, as no packed weight of K = ", k, " has, which is that of ", name);
  const Tensor holder = aligned(packed);
  return {holder, static_cast<const int8_t*>(holder.const_data_ptr()), n, k};
}

Tensor unpack_weight(const Tensor& packed, int64_t n, int64_t k) {
  const CudaCall call(packed, "packed");
  check_packed_form(packed);
  const bool possible = n >= 0 && n < kMaxN && k >= 0 && k <= kMaxK;
  check(possible && packed.numel() == packed_bytes(n, k), "n and k must be those of packed, which ",
        packed.numel(), " bytes cannot hold for ", n, " and ", k);
  const Tensor holder = aligned(packed);
  Tensor q = empty({n, k}, ScalarType::Char);
  unpack(call.stream(), UnpackArgs{static_cast<const int8_t*>(holder.const_data_ptr()), n, k,
                                   static_cast<int8_t*>(q.mutable_data_ptr())});
  call.check_launches();
  return q;
}

}  // namespace dynquant
