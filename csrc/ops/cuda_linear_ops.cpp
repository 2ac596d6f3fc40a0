// int_mm, rescale, scaled_mm and linear_dynamic on CUDA.
#include "../cuda/calls.inl.h"
#include "columns.h"
#include "cuda_call.h"
#include "cuda_packed.h"
#include "cuda_rows.h"
#include "grouped_weights.h"
#include "ops.h"

namespace dynquant {
namespace {

int64_t staged_stride(int64_t k) { return ceil_div(k, kChunk16) * kChunk16; }

// The part of the arguments that every product has in common.
FinishArgs finish_args(const CudaPacked& weight, int64_t m, Tensor& out, Dtype out_dtype) {
  FinishArgs f = {};
  f.packed = weight.data;
  f.out = out.mutable_data_ptr();
  f.out_dtype = out_dtype;
  f.m = m;
  f.n = weight.n;
  f.k = weight.k;
  return f;
}

void set_columns(FinishArgs& f, const Columns& columns) {
  f.weight_scale = columns.args.weight_scale;
  f.per_channel = columns.args.per_channel;
  f.bias = columns.args.bias;
}

// Rows of q as the product reads them: in place where they lie so, otherwise copied.
class QuantizedRows {
 public:
  QuantizedRows(const Tensor& q, const Tensor& zero_point)
      : rows_(checked(q)),
        is_signed_(q.scalar_type() == ScalarType::Char),
        args_(rows_args(rows_)),
        zero_point_(per_row(zero_point, "zero_point", ScalarType::Int, q)),
        in_place_(args_.aligned && rows_.k % kChunk16 == 0) {}

  int64_t m() const { return rows_.m; }
  int64_t k() const { return rows_.k; }

  // Fills in what the product needs to know of the rows, and multiplies.
  void multiply(const CudaCall& call, const FinishArgs& finish) const {
    if (finish.m == 0 || finish.n == 0) return;
    const Plan plan = choose_plan(finish.m, finish.n, finish.k, call.stream().processors());
    CudaMemory memory;
    const int64_t stride = in_place_ ? rows_.stride : staged_stride(rows_.k);
    const int64_t staged = memory.take(in_place_ ? 0 : rows_.m * stride, 1);
    const int64_t partial = memory.take(partial_sums(plan, finish.m, finish.n), sizeof(int32_t));
    memory.allocate();
    ProductArgs a = {};
    a.q = reinterpret_cast<const uint8_t*>(rows_.data);
    if (!in_place_) {
      uint8_t* to = memory.at<uint8_t>(staged);
      stage(call.stream(), StageArgs{a.q, rows_.stride, rows_.m, rows_.k, to, stride});
      a.q = to;
    }
    a.q_stride = stride;
    a.flip = is_signed_ ? 0x80808080u : 0;
    a.finish = finish;
    a.finish.zero_point = row_values<int32_t>(zero_point_);
    a.finish.zero_point_shift = is_signed_ ? 128 : 0;
    product(call.stream(), plan, a, memory.at<int32_t>(partial));
    call.check_launches();
  }

 private:
  static Rows checked(const Tensor& q) {
    check_tensor(q, "q", {ScalarType::Byte, ScalarType::Char});
    return rows_of(q, "q");
  }

  Rows rows_;
  bool is_signed_;
  RowsArgs args_;
  PerRow zero_point_;
  bool in_place_;
};

}  // namespace

Tensor int_mm(const Tensor& q, const Tensor& zero_point, const Tensor& packed, int64_t n) {
  const CudaCall call(q, "q");
  const QuantizedRows rows(q, zero_point);
  const CudaPacked weight = packed_of_depth(packed, rows.k(), "q");
  check(n == weight.n, "n must be that of packed, ", weight.n, ", got ", n);
  Tensor out = empty(leading_shape(q, n), ScalarType::Int);
  rows.multiply(call, finish_args(weight, rows.m(), out, Dtype::i32));
  return out;
}

Tensor rescale(const Tensor& acc, const Tensor& scale, const Tensor& weight_scale,
               const std::optional<Tensor>& bias, ScalarType dtype) {
  const CudaCall call(acc, "acc");
  check_tensor(acc, "acc", {ScalarType::Int});
  const Rows rows = rows_of(acc, "acc");
  const PerRow scales = per_row(scale, "scale", ScalarType::Float, acc);
  const Columns columns(weight_scale, bias, rows.k);
  const Dtype out_dtype = check_out_dtype(dtype);
  Tensor out = empty(leading_shape(acc, rows.k), dtype);
  FinishArgs f = {};
  f.scale = row_values<float>(scales);
  f.out = out.mutable_data_ptr();
  f.out_dtype = out_dtype;
  f.m = rows_args(rows).m;
  f.n = rows.k;
  set_columns(f, columns);
  const int64_t stride = rows.stride / static_cast<int64_t>(sizeof(int32_t));
  add_up(call.stream(), SumArgs{reinterpret_cast<const int32_t*>(rows.data), stride, 0, 1, f});
  call.check_launches();
  return out;
}

Tensor scaled_mm(const Tensor& q, const Tensor& scale, const Tensor& zero_point,
                 const Tensor& packed, const Tensor& weight_scale,
                 const std::optional<Tensor>& bias, ScalarType dtype) {
  const CudaCall call(q, "q");
  const QuantizedRows rows(q, zero_point);
  const PerRow scales = per_row(scale, "scale", ScalarType::Float, q);
  const CudaPacked weight = packed_of_depth(packed, rows.k(), "q");
  const Columns columns(weight_scale, bias, weight.n);
  const Dtype out_dtype = check_out_dtype(dtype);
  Tensor out = empty(leading_shape(q, weight.n), dtype);
  FinishArgs finish = finish_args(weight, rows.m(), out, out_dtype);
  finish.scale = row_values<float>(scales);
  set_columns(finish, columns);
  rows.multiply(call, finish);
  return out;
}

Tensor linear_dynamic(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, bool per_token, bool symmetric,
                      int64_t activation_bits) {
  check_cuda_bits("activation_bits", activation_bits);
  const CudaCall call(x, "x");
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const CudaPacked weight = packed_of_depth(packed, rows.k, "x");
  const Columns columns(weight_scale, bias, weight.n);
  Tensor out = empty(leading_shape(x, weight.n), x.scalar_type());
  const int64_t m = rows.m, n = weight.n;
  if (m == 0 || n == 0) return out;

  const Plan plan = choose_plan(m, n, rows.k, call.stream().processors());
  const int64_t stride = staged_stride(rows.k), parameters = per_token ? m : 1;
  CudaMemory memory;
  const int64_t q = memory.take(m * stride, 1);
  const int64_t scale = memory.take(parameters, sizeof(float));
  const int64_t zero_point = memory.take(parameters, sizeof(int32_t));
  const int64_t ranges = memory.take(per_token ? 0 : kMostRanges, sizeof(Range));
  const int64_t partial = memory.take(partial_sums(plan, m, n), sizeof(int32_t));
  memory.allocate();

  QuantizeRowsArgs quantization = {};
  quantization.rows = rows_args(rows);
  quantization.rule = symmetric ? Rule::symmetric : Rule::asymmetric;
  quantization.shift = symmetric ? 128 : 0;  // the product takes unsigned bytes
  quantization.q = memory.at<uint8_t>(q);
  quantization.q_stride = quantization.q_bytes = stride;
  quantization.scale = memory.at<float>(scale);
  quantization.zero_point = memory.at<int32_t>(zero_point);
  quantize(call.stream(), dtype, quantization, per_token ? Parameters::own : Parameters::whole,
           memory.at<Range>(ranges));

  ProductArgs a = {};
  a.q = memory.at<uint8_t>(q);
  a.q_stride = stride;
  a.finish = finish_args(weight, m, out, dtype);
  a.finish.zero_point = {memory.at<int32_t>(zero_point), per_token ? 1 : 0};
  a.finish.scale = {memory.at<float>(scale), per_token ? 1 : 0};
  set_columns(a.finish, columns);
  product(call.stream(), plan, a, memory.at<int32_t>(partial));
  call.check_launches();
  return out;
}

Tensor linear_grouped(const Tensor& x, const Tensor& counts, const Tensor& weight,
                      const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& bias,
                      int64_t n, bool per_token, bool symmetric, int64_t activation_bits) {
  check_cuda_bits("activation_bits", activation_bits);
  check(weight_scale.has_value(),
        "weight_scale must be given: weights in 16 bits have no CUDA kernel");
  const CudaCall call(x, "x");
  check_float(x, "x");
  const GroupedWeights held(checked_groups(counts), checked_depth(x), weight, weight_scale, bias,
                            n);
  call.check_not_capturing("linear_grouped");
  const int64_t m = x.size(0), bytes = packed_bytes(n, x.size(1));
  const std::vector<int64_t> sizes = sizes_of_groups(
      torch::stable::to(counts, torch::stable::Device(torch::headeronly::DeviceType::CPU)), m);
  Tensor rows = x, out = empty({m, n}, x.scalar_type());
  int64_t first = 0;
  for (int64_t group = 0; group < held.groups; ++group) {
    const int64_t size = sizes[static_cast<size_t>(group)];
    if (size == 0) continue;
    const auto own = [group](const Tensor& t) { return torch::stable::select(t, 0, group); };
    Tensor to = torch::stable::narrow(out, 0, first, size), packed = own(held.weight);
    const std::optional<Tensor> added =
        held.bias.holder.has_value() ? std::optional(own(*held.bias.holder)) : std::nullopt;
    const Tensor y = linear_dynamic(torch::stable::narrow(rows, 0, first, size),
                                    torch::stable::narrow(packed, 0, 0, bytes),
                                    own(*held.weight_scale), added, per_token, symmetric, 8);
    torch::stable::copy_(to, y);
    first += size;
  }
  Tensor rest = torch::stable::narrow(out, 0, first, m - first);
  torch::stable::zero_(rest);
  return out;
}

}  // namespace dynquant
