// Products with weights and vectors that are floats, or int8 that counts as such.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "convert.h"
#include "kernel_test.h"
#include "layout.h"

namespace dynquant {
namespace {

// The sum in the order that half.inl.h specifies.
template <class T>
float half_sum(const float* x, const T* w, int64_t k) {
  float partial[16] = {};
  for (int64_t i = 0; i < k; ++i) partial[i % 16] = std::fma(x[i], widen(w[i]), partial[i % 16]);
  for (int step = 8; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) partial[j] += partial[j + step];
  }
  return partial[0] + 0.0f;
}

template <class T>
void draw(std::mt19937& random, T* value) {
  narrow(std::normal_distribution<float>()(random), value);
}
void draw(std::mt19937& random, int8_t* value) {
  *value = static_cast<int8_t>(std::uniform_int_distribution<int>(-128, 127)(random));
}

constexpr Dtype dtype_of(float) { return Dtype::f32; }
constexpr Dtype dtype_of(Bfloat16) { return Dtype::bf16; }
constexpr Dtype dtype_of(Half) { return Dtype::f16; }
constexpr Dtype dtype_of(int8_t) { return Dtype::i8; }

// T: of the weight.
template <class T>
void test_half_gemm(const Kernels& kernels, int64_t m, int64_t n, int64_t k, std::mt19937& random) {
  std::normal_distribution<float> real;
  const int64_t stride = k + 3;
  std::vector<float> x(static_cast<size_t>(m * k)), bias(static_cast<size_t>(n));
  const int64_t values = n == 0 ? 0 : (n - 1) * stride + k;  // nothing lies behind the last row
  std::vector<T> weight(static_cast<size_t>(values));
  std::vector<Half> out(static_cast<size_t>(m * n));
  std::vector<float> y(out.size());
  for (float& value : x) value = real(random);
  for (float& value : bias) value = real(random);
  for (T& value : weight) draw(random, &value);
  if (m > 0 && n > 0) {  // products of -0, whose sum begins at 0
    for (int64_t i = 0; i < k; ++i) {
      x[i] = -std::abs(x[i]);
      weight[i] = T{};
    }
  }
  HalfGemmArgs a = {x.data(), k, m,           weight.data(), dtype_of(T()), stride, k,
                    0,        n, bias.data(), y.data(),      Dtype::f32,    n};
  kernels.half_gemm(a);
  a.bias = nullptr;
  a.out = out.data();
  a.out_dtype = Dtype::f16;
  kernels.half_gemm(a);
  for (int64_t i = 0; i < m * n; ++i) {
    const float sum = half_sum(x.data() + i / n * k, weight.data() + i % n * stride, k);
    Half rounded;
    narrow(sum, &rounded);
    expect(same(y[i], sum + bias[i % n]), kernels.name, "16-bit weight", m, n, k);
    expect(out[i].bits == rounded.bits, kernels.name, "16-bit weight and output", m, n, k);
  }
  std::vector<float> widened(weight.size());
  kernels.widen(weight.data(), dtype_of(T()), values, widened.data());
  for (size_t i = 0; i < weight.size(); ++i) {
    expect(same(widened[i], widen(weight[i])), kernels.name, "widened", m, n, k);
  }
}

template <class T>
void test_weighted_sums(const Kernels& kernels, int64_t heads, int64_t rows, int64_t n, int64_t dim,
                        std::mt19937& random) {
  std::normal_distribution<float> real;
  const int64_t stride = dim + 3, head_stride = n * stride + 5;
  std::vector<float> weights(static_cast<size_t>(heads * rows * n));
  std::vector<float> out(static_cast<size_t>(heads * rows * dim));
  std::vector<T> vectors(static_cast<size_t>(heads * head_stride)), column;
  for (float& value : weights) value = real(random);
  for (T& value : vectors) draw(random, &value);
  kernels.weighted_sums({weights.data(), n, rows, vectors.data(), dtype_of(T()), stride, n, dim,
                         out.data(), dim, heads, head_stride});
  for (int64_t i = 0; i < heads * rows * dim; ++i) {
    const int64_t row = i / dim, first = row / rows * head_stride + i % dim;
    column.clear();
    for (int64_t j = 0; j < n; ++j) column.push_back(vectors[first + j * stride]);
    expect(same(out[i], half_sum(weights.data() + row * n, column.data(), n)), kernels.name,
           "weighted sum", heads * 100 + rows, n, dim);
  }
}

// The product with a weight that is laid out in strips, W[n, k] or its transpose, and with the
// first of its k alone, of rows as they are and of rows in the order of strips.
template <class T>
void test_strips(const Kernels& kernels, int64_t m, int64_t n, int64_t k, std::mt19937& random) {
  std::normal_distribution<float> real;
  const int64_t filled = ceil_div(n, kStripColumns) * kStripColumns;
  std::vector<float> x(static_cast<size_t>(m * k)),
      strips(static_cast<size_t>(filled * strip_rows_of(k)));
  for (float& value : x) value = real(random);
  const int64_t ordered_stride = k + 5;
  std::vector<float> ordered(static_cast<size_t>(m * ordered_stride));
  for (bool transposed : {false, true}) {
    const int64_t stride = (transposed ? n : k) + 3;
    const int64_t n_stride = transposed ? 1 : stride, k_stride = transposed ? stride : 1;
    std::vector<T> weight(static_cast<size_t>((n - 1) * n_stride + (k - 1) * k_stride + 1)), row;
    for (T& value : weight) draw(random, &value);
    std::fill(strips.begin(), strips.end(), NAN);
    kernels.lay_strips({weight.data(), dtype_of(T()), n_stride, k_stride, n, k, strips.data()});
    for (float value : strips) expect(value == value, kernels.name, "strips", m, n, k);
    for (int64_t used : {k, k / 2}) {
      std::vector<float> out(static_cast<size_t>(m * filled), NAN), same_out = out;
      kernels.strips_gemm({x.data(), k, false, m, used, strips.data(), k, n, out.data(), filled});
      kernels.order_rows({x.data(), Dtype::f32, k, m, used, ordered.data(), ordered_stride});
      kernels.strips_gemm({ordered.data(), ordered_stride, true, m, used, strips.data(), k, n,
                           same_out.data(), filled});
      for (int64_t i = 0; i < n; ++i) {
        row.clear();
        for (int64_t j = 0; j < used; ++j) row.push_back(weight[i * n_stride + j * k_stride]);
        for (int64_t r = 0; r < m; ++r) {
          const float sum = half_sum(x.data() + r * k, row.data(), used);
          expect(same(out[r * filled + i], sum), kernels.name, "product with strips", m, n, k);
          expect(same(same_out[r * filled + i], sum), kernels.name, "product of ordered rows", m, n,
                 k);
        }
      }
    }
  }
}

// What reads vectors of T as they lie in memory.
template <class T>
void test_vectors_of(const Kernels& kernels, std::mt19937& random) {
  for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 13}) {
    for (int64_t n : {0, 1, 2, 3, 5, 8, 9, 63, 64, 65, 128, 200}) {
      for (int64_t k : {0, 1, 15, 16, 17, 32, 47}) test_half_gemm<T>(kernels, m, n, k, random);
    }
  }
  for (int64_t k = 16; k <= 144; k += 16) {  // to rows of two lines and more
    for (int64_t n : {63, 64, 65, 200}) {
      for (int64_t m : {1, 2}) test_half_gemm<T>(kernels, m, n, k, random);
    }
  }
  for (int64_t n : {1, 15, 16, 17, 31, 32, 33, 40, 64}) {
    for (int64_t dim : {1, 7, 8, 33, 63, 64, 65, 128, 150, 256, 260}) {
      for (int64_t rows : {1, 3}) test_weighted_sums<T>(kernels, 1, rows, n, dim, random);
      for (int64_t heads : {2, 4, 7}) test_weighted_sums<T>(kernels, heads, 2, n, dim, random);
    }
  }
  for (int64_t rows : {1, 2, 4, 5, 7}) {  // more vectors than are taken together, and more rows
    for (int64_t n : {271, 272, 300}) {
      for (int64_t dim : {24, 64, 100, 200, 300})
        test_weighted_sums<T>(kernels, 1, rows, n, dim, random);
    }
  }
  for (int64_t m : {1, 6, 11, 12, 13, 25}) {
    for (int64_t n : {1, 15, 16, 31, 32, 33}) {
      for (int64_t k : {1, 3, 15, 16, 17, 70}) test_strips<T>(kernels, m, n, k, random);
    }
    for (int64_t k : {511, 512, 531}) test_strips<T>(kernels, m, 33, k, random);
  }
}

}  // namespace

void test_products_in_floats(const Kernels& kernels, std::mt19937& random) {
  test_vectors_of<float>(kernels, random);
  test_vectors_of<Bfloat16>(kernels, random);
  test_vectors_of<Half>(kernels, random);
  test_vectors_of<int8_t>(kernels, random);
}

}  // namespace dynquant
