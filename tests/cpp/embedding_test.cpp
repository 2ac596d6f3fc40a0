// Quantized tables.
#include <cmath>
#include <random>
#include <vector>

#include "kernel_test.h"

namespace dynquant {
namespace {

void test_embedding(const Kernels& kernels, int64_t dim, int bits, std::mt19937& random) {
  constexpr int64_t kRows = 5;
  const int levels = (1 << bits) - 1;
  std::normal_distribution<float> real;
  std::vector<float> weight(static_cast<size_t>(kRows * dim)), qparams(2 * kRows);
  for (float& value : weight) value = real(random);
  const int64_t row_bytes = bits == 8 ? dim : (dim + 1) / 2;
  std::vector<uint8_t> rows(static_cast<size_t>(kRows * row_bytes));
  std::vector<float> values(weight.size());
  for (int64_t r = 0; r < kRows; ++r) {
    const float* x = weight.data() + r * dim;
    uint8_t* row = rows.data() + r * row_bytes;
    float* params = qparams.data() + 2 * r;
    expect(kernels.quantize_row(x, Dtype::f32, dim, bits, row, params), kernels.name, "quantized",
           r, 0, dim);
    float lo = dim > 0 ? x[0] : 0.0f, hi = lo;
    for (int64_t d = 0; d < dim; ++d) lo = std::fmin(lo, x[d]), hi = std::fmax(hi, x[d]);
    const float scale = hi > lo ? (hi - lo) / static_cast<float>(levels) : 1.0f;
    expect(params[0] == scale && params[1] == lo, kernels.name, "scale and offset", r, 0, dim);
    for (int64_t d = 0; d < dim; ++d) {
      const int q = bits == 8 ? row[d] : (row[d / 2] >> (d % 2 * 4)) & 15;
      expect(q == static_cast<int>(std::nearbyint((x[d] - lo) / scale)), kernels.name, "row", r, 0,
             dim);
      values[static_cast<size_t>(r * dim + d)] = static_cast<float>(q) * scale + lo;
    }
  }
  if (dim > 0) {
    std::vector<float> broken(weight.begin(), weight.begin() + dim);
    broken.back() = NAN;
    expect(!kernels.quantize_row(broken.data(), Dtype::f32, dim, bits, rows.data(), qparams.data()),
           kernels.name, "NaN in a row", 0, 0, dim);
    kernels.quantize_row(weight.data(), Dtype::f32, dim, bits, rows.data(), qparams.data());
  }

  std::vector<int32_t> indices;
  for (int i = 0; i < 20; ++i) indices.push_back(static_cast<int32_t>(random() % kRows));
  const int64_t offsets[] = {0, 3, 3, 20};
  std::vector<float> y(static_cast<size_t>(3 * dim));
  BagArgs a = {};
  a.rows = rows.data();
  a.row_bytes = row_bytes;
  a.bits = bits;
  a.qparams = qparams.data();
  a.dim = dim;
  a.indices = indices.data();
  a.count = 20;
  a.offsets = offsets;
  a.padding_idx = -1;
  a.end = 3;
  a.out = y.data();
  kernels.bags(a);
  for (int64_t b = 0; b < 3; ++b) {
    for (int64_t d = 0; d < dim; ++d) {
      float sum = 0.0f;
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
        sum += values[static_cast<size_t>(indices[static_cast<size_t>(i)] * dim + d)];
      }
      expect(same(y[static_cast<size_t>(b * dim + d)], sum), kernels.name, "bag", b, bits, dim);
    }
  }
}

}  // namespace

void test_embeddings(const Kernels& kernels, std::mt19937& random) {
  for (int64_t dim = 0; dim < 140; ++dim) {
    for (int bits : {4, 8}) test_embedding(kernels, dim, bits, random);
  }
}

}  // namespace dynquant
