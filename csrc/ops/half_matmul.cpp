// The product with a weight in 16 bits: by rows of it as they lie where rows of x are few, by
// strips (strips.inl.h), into which it is brought for the call, where they are many.
#include "half_matmul.h"

#include "../cpu/layout.h"
#include "float_rows.h"
#include "parallel.h"
#include "pieces.h"
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
  a.x_stride = row_stride_of(k);
  float* rows =
      reinterpret_cast<float*>(scratch(static_cast<size_t>(a.m * a.x_stride) * sizeof(float)));
  for (int64_t m = 0; m < a.m; ++m) {
    kernels.widen(x.data + (begin + m) * x.stride, x.dtype, k, rows + m * a.x_stride);
  }
  a.x = rows;
  return a;
}

// All rows of x and where their results go.
struct Operands {
  FloatMatrix x;
  const HalfWeight& weight;
  const float* bias;
  char* out;
  Dtype out_dtype;
  int64_t out_stride;

  char* out_row(int64_t m) const { return out + m * out_stride * bytes_of(out_dtype); }
};

void multiply_as_it_lies(const Kernels& kernels, const Operands& of, const Part& part) {
  const HalfWeight& weight = of.weight;
  const int64_t block =
      std::max<int64_t>(6, kBlockBytes / (std::max<int64_t>(weight.k, 1) * 4) / 6 * 6);
  for (int64_t begin = part.m_begin; begin < part.m_end; begin += block) {
    HalfGemmArgs a = block_of(kernels, of.x, weight.k, begin, std::min(part.m_end, begin + block));
    a.weight = weight.data;
    a.weight_dtype = weight.dtype;
    a.weight_stride = weight.stride;
    a.n_begin = part.n_begin;
    a.n_end = part.n_end;
    a.bias = of.bias;
    a.out = of.out_row(begin);
    a.out_dtype = of.out_dtype;
    a.out_stride = of.out_stride;
    kernels.half_gemm(a);
  }
}

void multiply_by_strips(const Kernels& kernels, const Operands& of, const Part& part) {
  constexpr int64_t kFloat = sizeof(float), kWholeRows = 12;
  constexpr int64_t kStripBytes = 256 * 1024, kRowBytes = 96 * 1024;  // together in the L2 cache
  constexpr int64_t kOrderedBytes = 4 * 1024 * 1024;  // of x, for which a strip is laid out anew
  const HalfWeight& weight = of.weight;
  const int64_t k = weight.k, x_values = of.x.stride / bytes_of(of.x.dtype);
  const int64_t stride = row_stride_of(k), row_bytes = stride * kFloat;
  const int64_t rows = part.m_end - part.m_begin, columns = part.n_end - part.n_begin;
  const int64_t block = std::max(kWholeRows, kRowBytes / row_bytes / kWholeRows * kWholeRows);
  const int64_t most = std::min(rows, std::max(8 * kWholeRows, kOrderedBytes / row_bytes));
  const int64_t strips = std::max<int64_t>(1, kStripBytes / (kStripColumns * k * kFloat));
  const int64_t width = std::min(strips, ceil_div(columns, kStripColumns)) * kStripColumns;
  const int64_t laid_values = width * strip_rows_of(k);
  Pieces pieces(Purpose::staged_rows,
                {most * row_bytes, laid_values * kFloat, block * width * kFloat});
  float* ordered = pieces.next<float>(most * stride);
  float* laid = pieces.next<float>(laid_values);
  float* sums = pieces.next<float>(block * width);
  for (int64_t first = part.m_begin; first < part.m_end; first += most) {
    const int64_t last = std::min(part.m_end, first + most);
    kernels.order_rows(
        {of.x.data + first * of.x.stride, of.x.dtype, x_values, last - first, k, ordered, stride});
    for (int64_t n = part.n_begin; n < part.n_end; n += width) {
      const int64_t count = std::min(width, part.n_end - n);
      kernels.lay_strips({weight.data + n * weight.stride * bytes_of(weight.dtype), weight.dtype,
                          weight.stride, 1, count, k, laid});
      for (int64_t m = first; m < last; m += block) {
        const int64_t in_block = std::min(block, last - m);
        kernels.strips_gemm({ordered + (m - first) * stride, stride, true, in_block, k, laid, k,
                             count, sums, width});
        kernels.finish_half(
            {sums, width, in_block, count, of.bias == nullptr ? nullptr : of.bias + n,
             of.out_row(m) + n * bytes_of(of.out_dtype), of.out_dtype, of.out_stride});
      }
    }
  }
}

}  // namespace

void half_matmul(const Kernels& kernels, const FloatMatrix& x, const HalfWeight& weight,
                 const float* bias, void* out, Dtype out_dtype, int64_t out_stride) {
  constexpr int64_t kManyRows = 64;
  const Operands of = {x, weight, bias, static_cast<char*>(out), out_dtype, out_stride};
  const Split split = choose_split(x.m, weight.n, weight.k, num_threads(), kernels.half_costs, 1);
  run_tasks(split.parts(), [&](int64_t task) {
    const Part part = part_of(split, task, x.m, weight.n);
    if (part.is_empty()) return;
    if (weight.k >= kernels.strips_from_k && part.m_end - part.m_begin >= kManyRows) {
      multiply_by_strips(kernels, of, part);
    } else {
      multiply_as_it_lies(kernels, of, part);
    }
  });
}

}  // namespace dynquant
