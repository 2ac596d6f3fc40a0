// linear_half, and the product beneath it.
#include "../cpu/layout.h"
#include "half_matmul.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "split.h"

namespace dynquant {
namespace {

constexpr int64_t kBlockBytes = 512 * 1024;  // of x, which then stays in the second-level cache

// Rows [begin, end) of x in fp32: where they lie, or widened into the thread's scratch memory.
HalfGemmArgs block_of(const Kernels& kernels, const FloatMatrix& x, int64_t k, int64_t begin,
                      int64_t end) {
  HalfGemmArgs a = {};
  a.m = end - begin;
  a.k = k;
  if (x.dtype == Dtype::f32) {
    a.x = reinterpret_cast<const float*>(x.data + begin * x.stride);
    a.x_stride = x.stride / static_cast<int64_t>(sizeof(float));
    return a;
  }
  // Rows at a power of two would share few cache sets: a line more between them spreads them.
  a.x_stride = ceil_div(k, 16) * 16 + 16;
  float* rows =
      reinterpret_cast<float*>(scratch(static_cast<size_t>(a.m * a.x_stride) * sizeof(float)));
  for (int64_t m = 0; m < a.m; ++m) {
    kernels.widen(x.data + (begin + m) * x.stride, x.dtype, k, rows + m * a.x_stride);
  }
  a.x = rows;
  return a;
}

}  // namespace

HalfWeight check_half_weight(const Tensor& weight, const char* name, bool fp32_too) {
  if (fp32_too) {
    check_float(weight, name);
  } else {
    check_tensor(weight, name, {ScalarType::BFloat16, ScalarType::Half});
  }
  check(weight.dim() == 2, name, " must have two dimensions [N, K], got ", ShapeOf(weight));
  Rows rows = rows_of(weight, name);
  return {rows.holder, check_out_dtype(weight.scalar_type()),
          rows.data,   rows.m,
          rows.k,      rows.stride / static_cast<int64_t>(weight.element_size())};
}

void half_matmul(const Kernels& kernels, const FloatMatrix& x, const HalfWeight& weight,
                 const float* bias, void* out, Dtype out_dtype, int64_t out_stride) {
  const int64_t out_bytes = bytes_of(out_dtype);
  const int64_t block =
      std::max<int64_t>(6, kBlockBytes / (std::max<int64_t>(weight.k, 1) * 4) / 6 * 6);
  const Split split = choose_split(x.m, weight.n, weight.k, num_threads(), kernels.half_costs, 1);
  run_tasks(split.parts(), [&](int64_t task) {
    const Part part = part_of(split, task, x.m, weight.n);
    if (part.is_empty()) return;
    for (int64_t begin = part.m_begin; begin < part.m_end; begin += block) {
      HalfGemmArgs a = block_of(kernels, x, weight.k, begin, std::min(part.m_end, begin + block));
      a.weight = weight.data;
      a.weight_dtype = weight.dtype;
      a.weight_stride = weight.stride;
      a.n_begin = part.n_begin;
      a.n_end = part.n_end;
      a.bias = bias;
      a.out = static_cast<char*>(out) + begin * out_stride * out_bytes;
      a.out_dtype = out_dtype;
      a.out_stride = out_stride;
      kernels.half_gemm(a);
    }
  });
}

Tensor linear_half(const Tensor& x, const Tensor& half_weight, const std::optional<Tensor>& bias) {
  const Kernels& kernels = kernels_in_use();
  const Dtype dtype = check_float(x, "x");
  const Rows rows = rows_of(x, "x");
  const HalfWeight held = check_half_weight(half_weight, "half_weight");
  check(rows.k == held.k, "x must have K = ", held.k,
        " as its last dimension, as half_weight has, got ", ShapeOf(x));
  const FloatBias added(bias, held.n);
  Tensor out = empty(leading_shape(x, held.n), x.scalar_type());
  half_matmul(kernels, {rows.data, dtype, rows.m, rows.stride}, held, added.data,
              out.mutable_data_ptr(), dtype, held.n);
  return out;
}

}  // namespace dynquant
