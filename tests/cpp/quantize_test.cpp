// Floats to integers, and 16-bit floats.
#include <cmath>
#include <cstring>
#include <iterator>
#include <random>
#include <vector>

#include "convert.h"
#include "kernel_test.h"
#include "layout.h"
#include "qparams.h"
#include "staged.h"

namespace dynquant {
namespace {

void test_quantize(const Kernels& kernels, const Product& product, int64_t k, bool symmetric,
                   int bits, std::mt19937& random) {
  std::normal_distribution<float> real;
  std::vector<float> x(static_cast<size_t>(k));
  for (float& value : x) value = real(random);
  const Range range = kernels.range(x.data(), Dtype::f32, k);
  float lo = 0.0f, hi = 0.0f;
  for (float value : x) lo = std::fmin(lo, value), hi = std::fmax(hi, value);
  expect(range.lo == lo && range.hi == hi && !range.has_nan, kernels.name, "range", 1, 0, k);
  const QParams p = choose_qparams(range, symmetric, bits);

  std::vector<uint8_t> q(static_cast<size_t>(k)), low_bytes(q.size());
  QuantizeArgs a = quantize_args(p, symmetric, false, bits);
  a.x = x.data();
  a.dtype = Dtype::f32;
  a.k = k;
  a.q = q.data();
  a.low = bits == 16 ? low_bytes.data() : nullptr;
  kernels.quantize(a);
  const float lowest = symmetric ? -127.0f : 0.0f;
  const float highest = symmetric ? 127.0f : bits == 16 ? 65535.0f : 255.0f;
  for (int64_t i = 0; i < k; ++i) {
    float value = std::nearbyint(x[i] * p.inv) + static_cast<float>(p.zero_point);
    const int wanted = static_cast<int>(std::fmin(std::fmax(value, lowest), highest));
    const int found = bits == 16 ? q[i] << 8 | low_bytes[i] : q[i];
    expect(found == (bits == 16 ? wanted : wanted & 255), kernels.name, "q", 1, 0, k);
  }

  const int64_t stride = staged_stride(product.layout, groups_of(k));
  const size_t bytes = static_cast<size_t>(staged_bytes(product.layout, stride, 1));
  std::vector<uint8_t> staged(bytes), in_two_steps(bytes);
  std::vector<uint8_t> staged_low(bytes), low_in_two_steps(bytes);
  product.stage(q.data(), k, symmetric ? 0x80 : 0, in_two_steps.data());
  product.stage(low_bytes.data(), k, 0, low_in_two_steps.data());
  QuantizeArgs fused = quantize_args(p, symmetric, true, bits);
  fused.x = x.data();
  fused.dtype = Dtype::f32;
  fused.k = k;
  fused.q = staged.data();
  fused.low = bits == 16 ? staged_low.data() : nullptr;
  product.quantize_staged(fused);
  expect(staged == in_two_steps, kernels.name, "staged q", 1, 0, k);
  if (bits == 16) {
    expect(staged_low == low_in_two_steps, kernels.name, "staged low bytes", 1, 0, k);
  }
  std::vector<uint8_t> with_hint(bytes);
  fused.q = with_hint.data();
  fused.ahead = x.data();
  product.quantize_staged(fused);
  expect(with_hint == in_two_steps, kernels.name, "staged with a hint", 1, 0, k);

  if (k == 0) return;
  x[static_cast<size_t>(random() % static_cast<unsigned>(k))] = NAN;
  expect(kernels.range(x.data(), Dtype::f32, k).has_nan, kernels.name, "NaN", 1, 0, k);
}

// Each vector as by itself: more than go together, with all that a range may be.
void test_quantize_vectors(const Kernels& kernels, int64_t k, bool symmetric,
                           std::mt19937& random) {
  constexpr int64_t kCount = 37;
  constexpr float kOdd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f, -1e-40f, 0.0f};
  const int64_t x_stride = k + 5, q_stride = k + 3, value_stride = 2;
  std::normal_distribution<float> real;
  std::vector<float> x(static_cast<size_t>(kCount * x_stride));
  for (float& value : x) value = real(random);
  for (int64_t i = 0; i < kCount && k > 0; i += 2) {
    float* vector = &x[static_cast<size_t>(i * x_stride)];
    if (i % 4 == 0) std::fill(vector, vector + k, 0.0f);
    vector[random() % static_cast<unsigned>(k)] = kOdd[random() % std::size(kOdd)];
    vector[random() % static_cast<unsigned>(k)] = kOdd[random() % std::size(kOdd)];
  }
  std::vector<uint8_t> q(static_cast<size_t>(kCount * q_stride)), alone(static_cast<size_t>(k));
  float scale[kCount * value_stride];
  int32_t zero_point[kCount * value_stride] = {};
  kernels.quantize_vectors({x.data(), Dtype::f32, kCount, x_stride, k, 0, symmetric, nullptr,
                            q.data(), q_stride, scale, symmetric ? nullptr : zero_point,
                            value_stride});
  for (int64_t i = 0; i < kCount; ++i) {
    const QParams p = choose_qparams(kernels.range(&x[i * x_stride], Dtype::f32, k), symmetric);
    QuantizeArgs a = quantize_args(p, symmetric, false);
    a.x = &x[i * x_stride];
    a.dtype = Dtype::f32;
    a.k = k;
    a.q = alone.data();
    kernels.quantize(a);
    expect(k == 0 || std::memcmp(alone.data(), &q[i * q_stride], alone.size()) == 0, kernels.name,
           "vectors", i, 0, k);
    expect(same(scale[i * value_stride], p.scale) && zero_point[i * value_stride] == p.zero_point,
           kernels.name, "scale and zero point of vectors", i, 0, k);
  }
}

// Around each edge of a register, values that are rounded.
template <class T>
void test_narrow(const Kernels& kernels, Dtype dtype, std::mt19937& random) {
  std::normal_distribution<float> real;
  for (int64_t k = 0; k < 70; ++k) {
    std::vector<float> x(static_cast<size_t>(k));
    std::vector<T> y(static_cast<size_t>(k));
    for (float& value : x) value = random() % 8 == 0 ? -0.0f : real(random);
    kernels.narrow(x.data(), k, dtype, y.data());
    for (int64_t i = 0; i < k; ++i) {
      T wanted;
      narrow(x[i], &wanted);
      expect(same(widen(y[i]), widen(wanted)), kernels.name, "narrowed", i, 0, k);
    }
  }
}

template <class T>
void test_16_bits(const Kernels& kernels, Dtype dtype) {
  // Every 16-bit value widens and comes back: K = 0 leaves the bias alone, which is every value.
  for (uint32_t high = 0; high < 0x10000u; high += 0x400u) {
    std::vector<float> bias;
    std::vector<T> values, out(0x400u);
    for (uint32_t i = 0; i < 0x400u; ++i) values.push_back({static_cast<uint16_t>(high + i)});
    for (T value : values) bias.push_back(widen(value));
    const int32_t zeros[0x400] = {};
    const float scale = -1.0f, one = 1.0f;  // -0 + y is y, for -0 as well
    const RescaleArgs a = {
        zeros, 0x400, 1, 0x400, {&scale, &one, false, bias.data(), out.data(), dtype, 0x400}};
    kernels.rescale(a);
    std::vector<T> narrowed(0x400u);
    kernels.narrow(bias.data(), 0x400, dtype, narrowed.data());
    for (uint32_t i = 0; i < 0x400u; ++i) {
      for (T found : {out[i], narrowed[i]}) {
        const bool is_nan = bias[i] != bias[i] && widen(found) != widen(found);
        expect(found.bits == values[i].bits || is_nan, kernels.name, "16-bit round trip", high + i,
               0, 0);
      }
      const Range range = kernels.range(&values[i], dtype, 1);
      expect(range.has_nan == (bias[i] != bias[i]), kernels.name, "16-bit NaN", high + i, 0, 0);
    }
  }
}

}  // namespace

void test_staging(const Kernels& kernels, const Product& product, std::mt19937& random) {
  for (int64_t k = 0; k < 140; ++k) {
    test_quantize(kernels, product, k, false, 8, random);
    test_quantize(kernels, product, k, true, 8, random);
    test_quantize(kernels, product, k, false, 16, random);
  }
  for (int64_t k : {511, 512, 513, 515, 1024, 1025}) {
    for (int bits : {8, 16}) test_quantize(kernels, product, k, false, bits, random);
  }
}

void test_quantization(const Kernels& kernels, std::mt19937& random) {
  for (int64_t k = 0; k < 140; ++k) {
    for (bool symmetric : {false, true}) test_quantize_vectors(kernels, k, symmetric, random);
  }
  test_16_bits<Bfloat16>(kernels, Dtype::bf16);
  test_16_bits<Half>(kernels, Dtype::f16);
  test_narrow<float>(kernels, Dtype::f32, random);
  test_narrow<Bfloat16>(kernels, Dtype::bf16, random);
  test_narrow<Half>(kernels, Dtype::f16, random);
}

}  // namespace dynquant
