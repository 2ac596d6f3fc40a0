#include "probes.h"

#include <chrono>
#include <memory>
#include <vector>

#include "../cpu/costs.h"
#include "../cpu/float_env.h"
#include "../cpu/layout.h"
#include "../cpu/qparams.h"
#include "../cpu/staged.h"
#include "../ops/weight_traffic.h"

namespace dynquant {
namespace {

double now() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// Seconds for one call of f: the shortest of several batches that together take `seconds`.
template <class F>
double time_calls(double seconds, const F& f) {
  constexpr int kBatches = 7;
  f();
  double begin = now();
  f();
  const double once = now() - begin;
  const int64_t calls = 1 + static_cast<int64_t>(seconds / kBatches / (once + 1e-9));
  double shortest = 1e9;
  for (int batch = 0; batch < kBatches; ++batch) {
    begin = now();
    for (int64_t i = 0; i < calls; ++i) f();
    const double each = (now() - begin) / static_cast<double>(calls);
    shortest = each < shortest ? each : shortest;
  }
  return shortest;
}

}  // namespace

double peak_rate(const Kernels& kernels, double seconds) {
  constexpr int64_t kSteps = 100000;
  const double each = time_calls(seconds, [&] { kernels.peak(kSteps); });
  return static_cast<double>(kernels.peak(1)) * kSteps / each;
}

double read_rate(const Kernels& kernels, int64_t bytes, double seconds) {
  const Aligned buffer(bytes);
  volatile int32_t sink = 0;
  const double each = time_calls(seconds, [&] { sink = kernels.read(buffer.data, bytes); });
  (void)sink;
  return static_cast<double>(bytes) / each;
}

double linear_seconds(const Kernels& kernels, int64_t m, int64_t n, int64_t k, double seconds) {
  const FloatEnv env;
  std::vector<float> x(static_cast<size_t>(m * k)), columns(static_cast<size_t>(n), 0.5f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 251) - 100.0f;
  const Aligned packed(packed_bytes(n, k)), out(m * n * static_cast<int64_t>(sizeof(float)));
  const Product& product = product_for(kernels, m, n, k);
  const int64_t stride = staged_stride(product.layout, groups_of(k));
  const Aligned staged(staged_bytes(product.layout, stride, m));
  std::vector<float> scale(static_cast<size_t>(m));
  std::vector<int32_t> zero_point(static_cast<size_t>(m));
  GemmArgs a = {};
  a.staged = staged.data;
  a.staged_stride = stride;
  a.zero_point = zero_point.data();
  a.panels = reinterpret_cast<const int8_t*>(packed.data) + kHeaderBytes;
  a.groups = groups_of(k);
  a.n_end = n;
  a.epilogue = {scale.data(), columns.data(), true, columns.data(), out.data, Dtype::f32, n};
  a.is_far = panels_of(n) * panel_bytes(k) > kStaysInL3;
  return time_calls(seconds, [&] {
    for_each_block(product, m, stride, product.row_multiple, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* values = x.data() + row * k;
        const QParams p = choose_qparams(kernels.range(values, Dtype::f32, k), false);
        QuantizeArgs q = quantize_args(p, false, true);
        q.x = values;
        q.dtype = Dtype::f32;
        q.k = k;
        q.q = staged.data + staged_offset(product.layout, stride, row - begin);
        q.ahead = row + 1 < m ? values + k : nullptr;
        product.quantize_staged(q);
        scale[static_cast<size_t>(row - begin)] = p.scale;
        zero_point[static_cast<size_t>(row - begin)] = p.zero_point;
      }
      a.m = end - begin;
      a.epilogue.out = out.data + begin * n * static_cast<int64_t>(sizeof(float));
      product.gemm(a);
    });
  });
}

}  // namespace dynquant
