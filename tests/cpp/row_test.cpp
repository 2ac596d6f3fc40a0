// What lies between products: activations, norms, softmax, attention scores, angles.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <random>
#include <vector>

#include "exp_of_one.h"
#include "gelu_table.h"
#include "kernel_test.h"
#include "layout.h"

namespace dynquant {
namespace {

void test_activate(const Kernels& kernels, int64_t n, std::mt19937& random) {
  std::normal_distribution<float> real(0.0f, 10.0f);
  const float special[] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, -87.7f, 1e-45f, 10.01f, -1e38f};
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i)
    x.push_back(random() % 4 == 0 ? special[random() % 9] : real(random));
  for (int tanh = 0; tanh < 2; ++tanh) {
    std::vector<float> y = x;
    kernels.activate({tanh ? Activation::tanh : Activation::sigmoid, Dtype::f32, y.data(), nullptr,
                      n, y.data()});
    for (int64_t i = 0; i < n; ++i) {
      expect(same(y[i], tanh ? tanh_of(x[i]) : sigmoid_of(x[i])), kernels.name,
             tanh ? "tanh" : "sigmoid", i, n, 0);
    }
  }
}

float gelu_of(float x) {
  const float a = std::fmin(std::fabs(x * kGeluRanges), kGeluLast);
  const float range = std::nearbyint(a), t = a - range;
  float sum = 0.0f;
  for (int j = kGeluPowers - 1; j >= 0; --j) {
    sum = sum * t + kGeluFactors[j][static_cast<int>(range)];
  }
  return (x < 0.0f ? 0.0f : x) - sum;
}

// The sum of a row in 16 partial sums.
float row_sum(const std::vector<float>& x) {
  float partial[16] = {};
  for (size_t i = 0; i < x.size(); ++i) partial[i % 16] += x[i];
  for (int step = 8; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) partial[j] += partial[j + step];
  }
  return partial[0];
}

float exp_below_zero(float x) {
  const Exp e(x != x ? x : std::fmax(-88.0f, x));
  return e.scale + e.scale * e.p;
}

// Rows of attention scores, more than are taken at once, with what is `added` in turn.
void test_scores(const Kernels& kernels, const std::vector<float>& x,
                 const std::vector<float> (&added)[2], const std::vector<float>& value_scale) {
  constexpr int64_t kRows = 13;
  const int64_t n = static_cast<int64_t>(x.size());
  const int64_t filled = ceil_div(n, kPartials) * kPartials, stride = filled + kPartials;
  // A bit for each of both, one for the scales and one for the sink.
  for (int terms = 0; terms < 16; ++terms) {
    std::vector<float> scores(static_cast<size_t>(kRows * stride), NAN), filled_up[2];
    const auto given = [&](int64_t r, int64_t i) { return x[static_cast<size_t>((r + i) % n)]; };
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < n; ++i) scores[r * stride + i] = given(r, i);
    }
    ScoresArgs a = {};
    a.scores = scores.data(), a.n = n, a.scale = -0.5f, a.rows = kRows, a.stride = stride;
    for (int j = 0; j < 2; ++j) {  // rows share the first, and each has its own of the second
      const int64_t apart = j == 0 ? 0 : filled;
      filled_up[j].assign(static_cast<size_t>(filled * kRows), 0.0f);
      for (int64_t i = 0; i < kRows * n; ++i) {
        filled_up[j][i / n * apart + i % n] = added[j][(apart == 0 ? i : i + i / n) % n];
      }
      if (terms & (1 << j)) a.added[j] = filled_up[j].data(), a.added_stride[j] = apart;
    }
    std::vector<float> scales = value_scale, sums(kRows);
    const bool has_nan = (terms & 7) == 7;
    if (has_nan) scales[static_cast<size_t>(n - 1)] = NAN;
    const float sink = x[static_cast<size_t>(n / 2)];
    if (terms & 8) a.sink = &sink;
    if (terms & 4) a.value_scale = scales.data();
    std::vector<Range> ranges(kRows);
    a.sum = sums.data(), a.range = ranges.data();
    kernels.scores(a);
    for (int64_t r = 0; r < kRows; ++r) {
      std::vector<float> s, p;
      for (int64_t i = 0; i < n; ++i) {
        s.push_back(given(r, i) * -0.5f);
        for (int j = 0; j < 2; ++j) {
          if (a.added[j] != nullptr) s.back() += a.added[j][r * a.added_stride[j] + i];
        }
      }
      float most = std::max(*std::max_element(s.begin(), s.end()), -FLT_MAX);
      if (a.sink != nullptr) most = std::max(most, sink);
      float hi = 0.0f;
      for (int64_t i = 0; i < n; ++i) {
        p.push_back(exp_below_zero(s[i] - most));
        const float scaled = a.value_scale == nullptr ? p.back() : p.back() * scales[i];
        hi = std::fmax(hi, scaled);
        expect(same(scores[r * stride + i], scaled), kernels.name, "scores", i, n, terms);
      }
      for (int64_t i = n; i < filled; ++i) {
        expect(same(scores[r * stride + i], 0.0f), kernels.name, "behind scores", i, n, terms);
      }
      float sum = row_sum(p);
      if (a.sink != nullptr) sum += exp_below_zero(sink - most);
      expect(same(sums[r], sum == 0.0f ? 1.0f : sum) && same(ranges[r].hi, hi) &&
                 ranges[r].lo == 0.0f && ranges[r].has_nan == has_nan,
             kernels.name, "sum and range of scores", r, n, terms);
    }
  }
}

// Several rows at once are what each of them is alone, in place too.
void test_norm_rows(const Kernels& kernels, const std::vector<float>& x,
                    const std::vector<float>& weight) {
  constexpr int64_t kRows = 6;
  const int64_t n = static_cast<int64_t>(x.size()), bytes = n * 4;
  std::vector<float> rows, residual, one(x.size());
  for (int64_t i = 0; i < kRows * n; ++i) {
    rows.push_back(x[static_cast<size_t>(i * 7 % n)]);
    residual.push_back(x[static_cast<size_t>(i * 5 % n)] * 0.5f);
  }
  for (Norm norm : {Norm::none, Norm::layer, Norm::rms, Norm::rms_plus_one}) {
    for (bool adds : {false, true}) {
      const float* bias = norm == Norm::layer ? weight.data() : nullptr;
      const auto args = [&](const float* from, int64_t first, float* to, int64_t count) {
        const float* added = adds ? residual.data() + first * n : nullptr;
        return NormArgs{norm,  Dtype::f32, from,  added, n,     weight.data(), bias,
                        0.25f, to,         count, bytes, bytes, bytes};
      };
      std::vector<float> together = rows;
      kernels.norm(args(together.data(), 0, together.data(), kRows));
      for (int64_t r = 0; r < kRows; ++r) {
        kernels.norm(args(rows.data() + r * n, r, one.data(), 1));
        for (int64_t i = 0; i < n; ++i) {
          expect(same(together[r * n + i], one[i]), kernels.name, "rows of norms", r, i, n);
        }
      }
    }
  }
}

void test_rows_of_blocks(const Kernels& kernels, int64_t n, std::mt19937& random) {
  std::normal_distribution<float> real(0.5f, 3.0f);
  const auto drawn = [&] {
    std::vector<float> values;
    for (int64_t i = 0; i < n; ++i) values.push_back(real(random));
    return values;
  };
  const auto check_rows = [&](const std::vector<float>& y, const auto& expected, const char* what) {
    for (int64_t i = 0; i < n; ++i) expect(same(y[i], expected(i)), kernels.name, what, i, n, 0);
  };
  const std::vector<float> x = drawn(), by = drawn(), weight = drawn(), bias = drawn();
  std::vector<float> y(x.size());
  kernels.activate({Activation::gelu, Dtype::f32, x.data(), by.data(), n, y.data()});
  check_rows(y, [&](int64_t i) { return gelu_of(x[i]) * by[i]; }, "gelu and a product");

  std::vector<float> sum, distance, squares;
  for (int64_t i = 0; i < n; ++i) sum.push_back(by[i] + x[i]);
  const float count = static_cast<float>(n), mean = row_sum(sum) / count;
  for (float value : sum) distance.push_back(value - mean);
  for (float value : distance) squares.push_back(value * value);
  const float inverse = 1.0f / std::sqrt(row_sum(squares) / count + 0.25f);
  kernels.norm({Norm::layer, Dtype::f32, x.data(), by.data(), n, weight.data(), bias.data(), 0.25f,
                y.data()});
  check_rows(
      y, [&](int64_t i) { return distance[i] * inverse * weight[i] + bias[i]; }, "layer norm");

  std::vector<float> own_squares;
  for (float value : x) own_squares.push_back(value * value);
  const float factor = 1.0f / std::sqrt(row_sum(own_squares) / count + 0.25f);
  for (Norm norm : {Norm::rms, Norm::rms_plus_one}) {
    kernels.norm({norm, Dtype::f32, x.data(), nullptr, n, weight.data(), nullptr, 0.25f, y.data()});
    const auto expected = [&](int64_t i) {
      return x[i] * factor * (norm == Norm::rms ? weight[i] : 1.0f + weight[i]);
    };
    check_rows(y, expected, "RMS norm");
  }

  float most = -INFINITY;
  for (float value : x) most = std::fmax(most, value);
  std::vector<float> p;
  for (float value : x) p.push_back(exp_below_zero(value - most));
  const float total = row_sum(p);
  kernels.softmax({Dtype::f32, x.data(), n, y.data()});
  check_rows(y, [&](int64_t i) { return p[i] / total; }, "softmax");
  const float three = 3.0f;
  kernels.divide({x.data(), n, &three, Dtype::f32, y.data(), 1, 0, 0});
  check_rows(y, [&](int64_t i) { return x[i] / 3.0f; }, "quotient");

  if (n > 0) {
    test_scores(kernels, x, {by, bias}, weight);
    test_norm_rows(kernels, x, weight);
  }

  const int64_t half = n / 2;
  kernels.rotary({Dtype::f32, x.data(), 2 * half, weight.data(), bias.data(), y.data()});
  for (int64_t i = 0; i < half; ++i) {
    const int64_t j = half + i;
    expect(same(y[i], x[i] * weight[i] - x[j] * bias[i]) &&
               same(y[j], x[j] * weight[j] + x[i] * bias[j]),
           kernels.name, "rotary", i, n, 0);
  }
  kernels.rotary({Dtype::f32, x.data(), 2 * half, weight.data(), bias.data(), y.data(), true});
  for (int64_t i = 0; i < 2 * half; ++i) {
    expect(same(y[i], x[i] * weight[i] + x[i ^ 1] * bias[i]), kernels.name, "neighbors", i, n, 0);
  }
}

}  // namespace

void test_rows(const Kernels& kernels, std::mt19937& random) {
  for (int64_t n = 0; n < 70; ++n) {
    test_activate(kernels, n, random);
    test_rows_of_blocks(kernels, n, random);
  }
  for (int64_t n : {127, 128, 129, 191, 192, 200, 1000}) {  // registers eight at a time, then four
    test_activate(kernels, n, random);
    test_rows_of_blocks(kernels, n, random);
  }
  test_activate(kernels, 100000, random);
}

}  // namespace dynquant
