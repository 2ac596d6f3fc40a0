// What mixes tokens without attention: the gated delta rule, the scan of state space models, and
// convolutions of one position.
#include <cmath>
#include <random>
#include <vector>

#include "exp_of_one.h"
#include "kernel_test.h"

namespace dynquant {
namespace {

// In what a kernel is to write, and beside it, before the call.
constexpr float kUntouched = 12345.0f;

// Gives the values of one call, among them what is not finite in some calls only: it would soon
// be all that is left of a state.
class Values {
 public:
  explicit Values(std::mt19937& random) : random_(random), is_wild_(random() % 4 == 0) {}

  std::vector<float> drawn(int64_t count, float mean = 0.0f) {
    const float special[] = {NAN, INFINITY, -INFINITY, -1e38f, 1e38f};
    const float harmless[] = {-0.0f, 0.0f, 1e-45f, -1e-39f};
    std::normal_distribution<float> real(mean, 1.0f);
    return filled(count, [&] {
      if (is_wild_ && random_() % 200 == 0) return special[random_() % 5];
      return random_() % 16 == 0 ? harmless[random_() % 4] : real(random_);
    });
  }

  // Mostly what a state fades by, and both sides of where its factor ends at 0.
  std::vector<float> exponents(int64_t count) {
    const float special[] = {NAN, INFINITY, -INFINITY, 88.5f, 1e38f};
    const float harmless[] = {-0.0f, 0.0f, 1e-45f, -1e-45f, 0.7f, -87.7f, -88.0f, -100.0f, -1e38f};
    std::normal_distribution<float> real(-1.0f, 1.0f);
    return filled(count, [&] {
      if (is_wild_ && random_() % 20 == 0) return special[random_() % 5];
      return random_() % 8 == 0 ? harmless[random_() % 9] : real(random_);
    });
  }

 private:
  template <class Draw>
  static std::vector<float> filled(int64_t count, const Draw& draw) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(draw());
    return values;
  }

  std::mt19937& random_;
  const bool is_wild_;
};

float factor_of(float x) {
  const Exp e(x != x ? x : std::fmax(-88.0f, -std::fabs(x)));
  const float factor = e.scale + e.scale * e.p;
  return std::signbit(x) ? factor : 1.0f / factor;
}

// Compares whole buffers, what lies beside the results included.
void expect_same(const std::vector<float>& got, const std::vector<float>& wanted,
                 const Kernels& kernels, const char* what, int64_t m, int64_t n, int64_t k) {
  for (size_t i = 0; i < got.size(); ++i) {
    expect(same(got[i], wanted[i]), kernels.name, what, m, n, k);
  }
}

void plain_delta_rule(const DeltaRuleArgs& a) {
  const auto sum_of = [&](const float* by, const std::vector<float>& s) {
    float sum = 0.0f;
    for (int64_t i = 0; i < a.dim; ++i) sum = std::fma(by[i], s[i], sum);
    return sum;
  };
  for (int64_t j = 0; j < a.columns; ++j) {
    std::vector<float> s;
    for (int64_t i = 0; i < a.dim; ++i) s.push_back(a.from[i * a.from_stride + j]);
    for (int64_t t = 0; t < a.tokens; ++t) {
      const float *query = a.query + t * a.vector_stride, *key = a.key + t * a.vector_stride;
      const float keep = factor_of(a.decay[t]), read = sum_of(key, s);
      const float added = a.beta[t] * (a.value[t * a.value_stride + j] - keep * read);
      for (int64_t i = 0; i < a.dim; ++i) s[i] = std::fma(key[i], added, keep * s[i]);
      a.out[t * a.out_stride + j] = a.scale * sum_of(query, s);
    }
    for (int64_t i = 0; i < a.dim; ++i) a.state[i * a.state_stride + j] = s[i];
  }
}

// `apart`: whether rows lie further apart than they are long, each kind by another stride.
void test_delta_rule(const Kernels& kernels, int64_t tokens, int64_t dim, int64_t columns,
                     bool in_place, bool apart, std::mt19937& random) {
  const auto stride = [&](int64_t length, int64_t more) { return apart ? length + more : length; };
  DeltaRuleArgs a = {};
  a.vector_stride = stride(dim, 1), a.value_stride = stride(columns, 2);
  a.state_stride = stride(columns, 3), a.out_stride = stride(columns, 4);
  a.from_stride = in_place ? a.state_stride : stride(columns, 5);
  a.tokens = tokens, a.dim = dim, a.columns = columns, a.scale = -0.3f;

  Values values(random);
  const std::vector<float> query = values.drawn(tokens * a.vector_stride);
  const std::vector<float> key = values.drawn(tokens * a.vector_stride);
  const std::vector<float> value = values.drawn(tokens * a.value_stride, 1.0f);
  const std::vector<float> decay = values.exponents(tokens), beta = values.drawn(tokens, 0.5f);
  const std::vector<float> from = values.drawn(dim * a.from_stride);
  a.query = query.data(), a.key = key.data(), a.value = value.data();
  a.decay = decay.data(), a.beta = beta.data();

  std::vector<float> state = from;
  if (!in_place) state.assign(static_cast<size_t>(dim * a.state_stride), kUntouched);
  std::vector<float> out(static_cast<size_t>(tokens * a.out_stride), kUntouched);
  std::vector<float> wanted_state = state, wanted_out = out;
  const auto run = [&](const auto& rule, std::vector<float>& to, std::vector<float>& y) {
    a.from = in_place ? to.data() : from.data(), a.state = to.data(), a.out = y.data();
    rule(a);
  };
  run(kernels.delta_rule, state, out);
  run(plain_delta_rule, wanted_state, wanted_out);
  expect_same(state, wanted_state, kernels, "state of the delta rule", tokens, columns, dim);
  expect_same(out, wanted_out, kernels, "delta rule", tokens, columns, dim);
}

void plain_scan(const SelectiveScanArgs& a) {
  const float* from = a.from;
  for (int64_t t = 0; t < a.tokens; ++t, from = a.state) {
    for (int64_t r = 0; r < a.rows; ++r) {
      const float x = a.x[t * a.rows + r], dt = a.dt[a.shares_dt ? t : t * a.rows + r];
      float partial[16] = {};
      for (int64_t j = 0; j < a.n; ++j) {
        const float rate = a.rate_is_one ? *a.rate : a.rate[r * a.rate_stride + j];
        const float kept = factor_of(dt * rate) * from[r * a.n + j];
        const float s = std::fma(dt * x, a.b[t * a.n + j], kept);
        a.state[r * a.n + j] = s;
        partial[j % 16] = std::fma(a.c[t * a.n + j], s, partial[j % 16]);
      }
      for (int step = 8; step > 0; step /= 2) {
        for (int j = 0; j < step; ++j) partial[j] += partial[j + step];
      }
      float& out = a.out[t * a.rows + r];
      out = partial[0] + 0.0f;
      if (a.skip != nullptr) out = std::fma(a.skip[a.shares_dt ? 0 : r], x, out);
    }
  }
}

// What rows share: their dt and skip, and how many rates there are.
struct Shared {
  bool dt;
  enum Rate { one, of_states, of_rows, of_rows_apart } rate;
};

void test_scan(const Kernels& kernels, int64_t tokens, int64_t rows, int64_t n, Shared shared,
               bool in_place, std::mt19937& random) {
  SelectiveScanArgs a = {};
  a.shares_dt = shared.dt, a.rate_is_one = shared.rate == Shared::one;
  if (shared.rate >= Shared::of_rows) a.rate_stride = shared.rate == Shared::of_rows ? n : n + 3;
  a.tokens = tokens, a.rows = rows, a.n = n;

  Values values(random);
  const std::vector<float> x = values.drawn(tokens * rows);
  const std::vector<float> dt = values.drawn(a.shares_dt ? tokens : tokens * rows, 1.0f);
  const std::vector<float> rate =
      values.exponents(a.rate_is_one ? 1 : (rows - 1) * a.rate_stride + n);
  const std::vector<float> b = values.drawn(tokens * n), c = values.drawn(tokens * n, 0.5f);
  const std::vector<float> skip = values.drawn(a.shares_dt ? 1 : rows);
  const std::vector<float> from = values.drawn(rows * n);
  a.x = x.data(), a.dt = dt.data(), a.rate = rate.data(), a.b = b.data(), a.c = c.data();
  if (random() % 2 == 0) a.skip = skip.data();

  std::vector<float> state = from;
  if (!in_place) state.assign(from.size(), kUntouched);
  std::vector<float> out(x.size(), kUntouched), wanted_state = state, wanted_out = out;
  const auto run = [&](const auto& scan, std::vector<float>& to, std::vector<float>& y) {
    a.from = in_place ? to.data() : from.data(), a.state = to.data(), a.out = y.data();
    scan(a);
  };
  run(kernels.selective_scan, state, out);
  run(plain_scan, wanted_state, wanted_out);
  expect_same(state, wanted_state, kernels, "state of the scan", tokens, rows, n);
  expect_same(out, wanted_out, kernels, "scan", tokens, rows, n);
}

void test_taps_of(const Kernels& kernels, int64_t taps, int64_t n, bool has_bias,
                  std::mt19937& random) {
  Values values(random);
  const std::vector<float> weight = values.drawn(taps * n), bias = values.drawn(n);
  std::vector<std::vector<float>> x;
  std::vector<const float*> places;
  for (int64_t tap = 0; tap < taps; ++tap) x.push_back(values.drawn(n));
  for (const std::vector<float>& of_tap : x) places.push_back(of_tap.data());
  std::vector<float> y(static_cast<size_t>(n), kUntouched), wanted;
  kernels.taps({weight.data(), places.data(), has_bias ? bias.data() : nullptr, taps, n, y.data()});
  for (int64_t i = 0; i < n; ++i) {
    float sum = has_bias ? bias[i] : 0.0f;
    for (int64_t tap = 0; tap < taps; ++tap) sum = std::fma(weight[tap * n + i], x[tap][i], sum);
    wanted.push_back(sum);
  }
  expect_same(y, wanted, kernels, "taps", taps, n, has_bias);
}

constexpr int64_t kTokens[] = {1, 2, 3, 5};
constexpr int64_t kDims[] = {1, 2, 3, 4, 7, 16, 17};
constexpr int64_t kStates[] = {1, 5, 15, 16, 17, 31, 32, 33, 64, 128};
constexpr Shared kShared[] = {{true, Shared::one},      {true, Shared::of_states},
                              {true, Shared::of_rows},  {false, Shared::of_states},
                              {false, Shared::of_rows}, {false, Shared::of_rows_apart}};

// All kernels at one number of columns, rows or channels.
void test_width(const Kernels& kernels, int64_t width, std::mt19937& random) {
  for (int64_t tokens : kTokens) {
    for (int way = 0; way < 4; ++way) {
      test_delta_rule(kernels, tokens, kDims[random() % 7], width, way % 2, way / 2, random);
    }
  }
  for (int64_t taps : {1, 2, 3, 4}) {
    for (bool has_bias : {false, true}) test_taps_of(kernels, taps, width, has_bias, random);
  }
  for (Shared shared : kShared) {
    const bool in_place = random() % 2 == 0;
    test_scan(kernels, kTokens[random() % 4], width, kStates[random() % 10], shared, in_place,
              random);
  }
}

}  // namespace

void test_mixers(const Kernels& kernels, std::mt19937& random) {
  for (int64_t width = 1; width <= 70; ++width) test_width(kernels, width, random);
  for (int64_t width : {127, 128, 129, 192, 193}) test_width(kernels, width, random);
  for (int64_t dim : {31, 32, 33, 64, 128}) {  // of heads as models have them
    for (bool in_place : {false, true}) {
      test_delta_rule(kernels, 5, dim, kDeltaColumns, in_place, true, random);
      test_delta_rule(kernels, 2, dim, 64, in_place, false, random);
    }
  }
  for (int64_t n = 1; n <= 70; ++n) {
    for (Shared shared : kShared) test_scan(kernels, 2, 1 + n % 9, n, shared, n % 2 == 0, random);
  }
  for (int64_t n : kStates) {
    for (int64_t rows : {1, 3, 4, 5, 16, 19}) {
      for (Shared shared : kShared) test_scan(kernels, 3, rows, n, shared, rows % 2 == 0, random);
    }
  }
}

}  // namespace dynquant
