// The kernels against loops that say the same in plain C++, without torch or Python: for every
// instruction set that runs here, and for plain sets of odd widths and tiles that no processor has.
// Built with the sanitizers by `make sanitize`; every buffer is allocated at its exact size.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "amx_trap.h"
#include "amx_trap_test.h"
#include "convert.h"
#include "dispatch.h"
#include "float_env.h"
#include "gelu_table.h"
#include "layout.h"
#include "pack.h"
#include "plain_sets.h"
#include "qparams.h"
#include "staged.h"

using namespace dynquant;

namespace {

int failures = 0;
long comparisons = 0;

void expect(bool holds, const char* isa, const char* what, long m, long n, long k) {
  ++comparisons;
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("%s: %s differs at M=%ld N=%ld K=%ld\n", isa, what, m, n, k);
}

void flush_subnormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);  // FTZ and DAZ
#elif defined(__aarch64__)
  uint64_t fpcr;
  __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
  __asm__ volatile("msr fpcr, %0" : : "r"(fpcr | 1 << 24));  // FZ
#endif
}

bool is_zero(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits << 1 == 0;  // a comparison of floats would flush a subnormal
}

bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

struct Case {
  int64_t m, n, k;
  std::vector<uint8_t> q;
  std::vector<int8_t> weight;
  std::vector<int32_t> zero_point;
  std::vector<float> scale, weight_scale, bias;

  Case(int64_t m_, int64_t n_, int64_t k_, std::mt19937& random) : m(m_), n(n_), k(k_) {
    std::uniform_int_distribution<int> byte(0, 255), weights(-127, 127);
    std::normal_distribution<float> real;
    for (int64_t i = 0; i < m * k; ++i) q.push_back(static_cast<uint8_t>(byte(random)));
    for (int64_t i = 0; i < n * k; ++i) weight.push_back(static_cast<int8_t>(weights(random)));
    for (int64_t i = 0; i < m; ++i) zero_point.push_back(byte(random));
    for (int64_t i = 0; i < m; ++i) scale.push_back(std::exp(real(random)));
    for (int64_t i = 0; i < n; ++i) weight_scale.push_back(std::exp(real(random)));
    for (int64_t i = 0; i < n; ++i) bias.push_back(real(random));
  }

  int32_t acc(int64_t row, int64_t column) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      sum += (int64_t{q[row * k + i]} - zero_point[row]) * weight[column * k + i];
    }
    return static_cast<int32_t>(sum);
  }
};

// Memory whose end is the start of a page that nothing may touch, where the system has such pages.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t whole = (static_cast<size_t>(bytes) + page - 1) / page * page;
    size_ = whole + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED ||
        mprotect(static_cast<char*>(memory) + whole, page, PROT_NONE) != 0) {
      std::perror("guard page");
      std::exit(1);
    }
    begin_ = static_cast<uint8_t*>(memory);
    data = begin_ + whole - bytes;
  }
  ~Guarded() { munmap(begin_, size_); }
  Guarded(const Guarded&) = delete;

  uint8_t* data;

 private:
  uint8_t* begin_;
  size_t size_;
};

// The unit of several products, kept over them, and given back by whoever keeps it.
class Unit {
 public:
  ~Unit() {
    if (state.release != nullptr) state.release();
  }
  UnitState state = {};
};

void expect_no_tiles(const Kernels& kernels, const GemmArgs& a) {
  expect(!amx_trap_holds_tiles, kernels.name, "release of the tiles", a.m, a.n_end, 4 * a.groups);
}

// The int32 sums of a case, which stages its rows.
GemmArgs sums_args(const Product& product, const Case& c, uint8_t* staged, const int8_t* panels,
                   int32_t* sums) {
  GemmArgs a = {};
  a.groups = groups_of(c.k);
  a.staged_stride = staged_stride(product.layout, a.groups);
  for (int64_t m = 0; m < c.m; ++m) {
    product.stage(c.q.data() + m * c.k, c.k, 0,
                  staged + staged_offset(product.layout, a.staged_stride, m));
  }
  a.staged = staged;
  a.zero_point = c.zero_point.data();
  a.m = c.m;
  a.panels = panels;
  a.n_end = c.n;
  a.epilogue.out = sums;
  a.epilogue.out_dtype = Dtype::i32;
  a.epilogue.out_stride = c.n;
  return a;
}

// The rows of a case as pairs of high and low bytes. `a` is set but for what pairs need.
void test_pairs(const Kernels& kernels, const Product& product, const Case& c, GemmArgs a) {
  std::vector<float> y(static_cast<size_t>(c.m / 2 * c.n));
  a.pairs = true;
  a.epilogue.out = y.data();
  product.gemm(a);
  for (int64_t i = 0; i < c.m / 2 * c.n; ++i) {
    const int64_t pair = i / c.n, n = i % c.n;
    const float high = static_cast<float>(c.acc(2 * pair, n));
    const float low = static_cast<float>(c.acc(2 * pair + 1, n));
    float wanted = 256.0f * high + low;
    wanted *= c.scale[pair];
    wanted *= c.weight_scale[a.epilogue.per_channel ? n : 0];
    if (a.epilogue.bias != nullptr) wanted += c.bias[n];
    expect(same(y[i], wanted), kernels.name, "pairs", c.m, c.n, c.k);
  }
}

void test_gemm(const Kernels& kernels, const Product& product, const Case& c) {
  std::vector<int8_t> packed(static_cast<size_t>(packed_bytes(c.n, c.k)));
  pack_header(packed.data(), c.n, c.k);
  for (int64_t p = 0; p < panels_of(c.n); ++p) {
    pack_panel(c.weight.data(), c.k, c.n, c.k, p, packed.data());
  }
  std::vector<int8_t> row(static_cast<size_t>(c.k));
  for (int64_t n = 0; n < c.n; ++n) {
    unpack_row(packed.data(), c.k, n, row.data());
    expect(c.k == 0 || std::memcmp(row.data(), &c.weight[n * c.k], row.size()) == 0, kernels.name,
           "unpack", c.m, c.n, c.k);
  }

  const StagedLayout& layout = product.layout;
  Guarded staged(staged_bytes(layout, staged_stride(layout, groups_of(c.k)), c.m));
  const int64_t panels = panels_of(c.n) * panel_bytes(c.k);
  Guarded weight(panels + c.m % 2);  // at an odd address for odd m: packed bytes lie anywhere
  std::memcpy(weight.data, packed.data() + kHeaderBytes, static_cast<size_t>(panels));
  std::vector<int32_t> sums(static_cast<size_t>(c.m * c.n));
  GemmArgs a =
      sums_args(product, c, staged.data, reinterpret_cast<const int8_t*>(weight.data), sums.data());
  product.gemm(a);
  expect_no_tiles(kernels, a);
  std::vector<int32_t> far(sums.size());
  a.is_far = true;
  a.epilogue.out = far.data();
  product.gemm(a);
  expect(far == sums, kernels.name, "int32 sums from memory", c.m, c.n, c.k);

  std::optional<Unit> unit(std::in_place);
  a.unit = &unit->state;
  for (int with_bias = 0; with_bias < 2; ++with_bias) {
    for (int per_channel = 0; per_channel < 2; ++per_channel) {
      a.is_far = with_bias != per_channel;
      std::vector<float> y(sums.size()), rescaled(sums.size());
      a.epilogue = {c.scale.data(),
                    c.weight_scale.data(),
                    per_channel == 1,
                    with_bias ? c.bias.data() : nullptr,
                    y.data(),
                    Dtype::f32,
                    c.n};
      product.gemm(a);
      RescaleArgs r = {sums.data(), c.n, c.m, c.n, a.epilogue};
      r.epilogue.out = rescaled.data();
      kernels.rescale(r);
      if (c.m % 2 == 0) test_pairs(kernels, product, c, a);
      for (int64_t m = 0; m < c.m; ++m) {
        for (int64_t n = 0; n < c.n; ++n) {
          const int64_t i = m * c.n + n;
          expect(sums[i] == c.acc(m, n), kernels.name, "int32 sum", c.m, c.n, c.k);
          float wanted = static_cast<float>(sums[i]) * c.scale[m];
          wanted *= c.weight_scale[per_channel ? n : 0];
          if (with_bias) wanted += c.bias[n];
          expect(same(y[i], wanted), kernels.name, "output", c.m, c.n, c.k);
          expect(same(rescaled[i], wanted), kernels.name, "rescale", c.m, c.n, c.k);
        }
      }
    }
  }
  unit.reset();
  expect_no_tiles(kernels, a);
}

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
    for (uint32_t i = 0; i < 0x400u; ++i) {
      const bool equal = out[i].bits == values[i].bits;
      expect(equal || (bias[i] != bias[i] && widen(out[i]) != widen(out[i])), kernels.name,
             "16-bit round trip", high + i, 0, 0);
      const Range range = kernels.range(&values[i], dtype, 1);
      expect(range.has_nan == (bias[i] != bias[i]), kernels.name, "16-bit NaN", high + i, 0, 0);
    }
  }
}

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

// sigmoid and tanh, value by value, with the same operations in the same order.
struct Exp {
  float scale, p;

  explicit Exp(float y) {
    const float n = std::nearbyint(y * 1.44269504f);
    const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    float sum = 1.3946553e-3f;
    for (float c : {8.366644e-3f, 4.166628e-2f, 1.6666542e-1f, 0.5f}) sum = sum * r + c;
    p = sum * (r * r) + r;
    scale = n <= -127.0f ? 0.0f : std::ldexp(1.0f, n != n ? 0 : static_cast<int>(n));
  }
};

float sigmoid_of(float x) {
  const Exp e(x != x ? x : std::fmax(-88.0f, -std::fabs(x)));
  const float z = e.scale + e.scale * e.p;
  return (std::signbit(x) ? z : 1.0f) / (1.0f + z);
}

float tanh_of(float x) {
  const float limited = x != x ? x : std::fmax(-10.0f, -std::fabs(x));
  const Exp e(limited + limited);
  const float t = e.scale * e.p + (e.scale - 1.0f);
  return std::copysign(t / (2.0f + t), x);
}

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
  for (int terms = 0; terms < 8; ++terms) {  // a bit for each of both, and one for the scales
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
    if (terms == 7) scales[static_cast<size_t>(n - 1)] = NAN;
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
      const float most = std::max(*std::max_element(s.begin(), s.end()), -FLT_MAX);
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
      const float sum = row_sum(p);
      expect(same(sums[r], sum == 0.0f ? 1.0f : sum) && same(ranges[r].hi, hi) &&
                 ranges[r].lo == 0.0f && ranges[r].has_nan == (terms == 7),
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
}

// Packing rows as their transpose is packing what was transposed before, but for the column sums.
void test_pack_transposed(const Kernels& kernels, int64_t n, int64_t k, std::mt19937& random) {
  std::vector<int8_t> rows(static_cast<size_t>(n * k)), transposed(rows.size());
  for (int8_t& value : rows) value = static_cast<int8_t>(random() % 255 - 127);
  for (int64_t i = 0; i < n * k; ++i) transposed[i % k * n + i / k] = rows[i];
  std::vector<int8_t> packed(static_cast<size_t>(packed_bytes(k, n)));
  std::vector<int8_t> panels(static_cast<size_t>(panels_of(k) * panel_bytes(n)));
  kernels.pack_transposed({rows.data(), k, n, k, panels.data()});
  const bool sums = kernels.sum_columns != nullptr;
  if (sums) kernels.sum_columns(panels.data(), k, n);
  const int64_t unset = sums ? 0 : kPanelColumns * kGroup;
  for (int64_t p = 0; p < panels_of(k); ++p) {
    pack_panel(transposed.data(), n, k, n, p, packed.data());
    const int64_t at = p * panel_bytes(n) + unset;
    expect(std::memcmp(packed.data() + kHeaderBytes + at, panels.data() + at,
                       static_cast<size_t>(panel_bytes(n) - unset)) == 0,
           kernels.name, "transposed panel", p, n, k);
  }
}

// A row's states after a step: h, then c.
std::vector<float> gates_of(Cell cell, const std::vector<float>& input,
                            const std::vector<float>& hidden, std::vector<float> states,
                            int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto sum = [&](int64_t gate) { return input[gate * n + i] + hidden[gate * n + i]; };
    float& h = states[i];
    float& c = states[n + i];
    if (cell == Cell::lstm) {
      c = sigmoid_of(sum(1)) * c + sigmoid_of(sum(0)) * tanh_of(sum(2));
      h = sigmoid_of(sum(3)) * tanh_of(c);
    } else if (cell == Cell::gru) {
      const float added = tanh_of(input[2 * n + i] + sigmoid_of(sum(0)) * hidden[2 * n + i]);
      h = (h - added) * sigmoid_of(sum(1)) + added;
    } else if (cell == Cell::rnn_tanh) {
      h = tanh_of(sum(0));
    } else {
      h = sum(0) < 0.0f ? 0.0f : sum(0);
    }
  }
  return states;
}

void test_gates(const Kernels& kernels, int64_t n, std::mt19937& random) {
  std::normal_distribution<float> real(0.0f, 3.0f);
  const auto drawn = [&](int64_t count) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(random() % 40 == 0 ? NAN : real(random));
    return values;
  };
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu}) {
    const int64_t gates = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
    const std::vector<float> input = drawn(gates * n), hidden = drawn(gates * n);
    const std::vector<float> before = drawn(2 * n);
    const std::vector<float> wanted = gates_of(cell, input, hidden, before, n);
    std::vector<float> h(before.begin(), before.begin() + n), c(before.begin() + n, before.end());
    kernels.gates(
        {cell, input.data(), hidden.data(), n, h.data(), cell == Cell::lstm ? c.data() : nullptr});
    for (int64_t i = 0; i < n; ++i) {
      expect(same(h[i], wanted[i]), kernels.name, "h", static_cast<long>(cell), n, i);
      expect(same(c[i], wanted[n + i]), kernels.name, "c", static_cast<long>(cell), n, i);
    }
  }
}

// The caller's rounding and its flushing of subnormals hold outside a FloatEnv and not within.
void test_float_env() {
  volatile float one = 1.0f, ulp = 0x1p-24f, tiny = 0x1p-130f;
  const FloatEnv outer;
  flush_subnormals();
  std::fesetround(FE_UPWARD);
  expect(one + ulp > 1.0f, "caller", "rounding upward", 0, 0, 0);
  expect(is_zero(tiny * one), "caller", "flushed subnormal", 0, 0, 0);
  {
    const FloatEnv env;
    expect(one + ulp == 1.0f, "FloatEnv", "rounding", 0, 0, 0);
    expect(tiny * one == 0x1p-130f, "FloatEnv", "subnormal", 0, 0, 0);
  }
  expect(one + ulp > 1.0f, "caller", "rounding given back", 0, 0, 0);
  expect(is_zero(tiny * one), "caller", "flushing given back", 0, 0, 0);
}

// Sums of ever other numbers of rows, one after the other in one unit.
void test_unit(const Kernels& kernels, const Product& product, std::mt19937& random) {
  const Case all(70, 40, 70, random);
  std::vector<int8_t> packed(static_cast<size_t>(packed_bytes(all.n, all.k)));
  pack_panel(all.weight.data(), all.k, all.n, all.k, 0, packed.data());
  const int64_t stride = staged_stride(product.layout, groups_of(all.k));
  Guarded staged(staged_bytes(product.layout, stride, all.m));
  std::vector<int32_t> sums(static_cast<size_t>(all.m * all.n));
  GemmArgs a = sums_args(product, all, staged.data, packed.data() + kHeaderBytes, sums.data());
  Unit unit;
  a.unit = &unit.state;
  for (int64_t rows : {32, 5, 5, 0, 64, 70, 16, 37, 17, 1, 32}) {
    a.m = rows;
    std::fill(sums.begin(), sums.end(), 0);
    product.gemm(a);
    for (int64_t i = 0; i < rows * all.n; ++i) {
      expect(sums[i] == all.acc(i / all.n, i % all.n), kernels.name, "sum in a unit", rows, all.n,
             all.k);
    }
  }
}

void test_product(const Kernels& kernels, const Product& product, std::mt19937& random) {
  test_unit(kernels, product, random);
  for (int64_t m = 1; m < 9; ++m) {  // whole panels side by side
    for (int64_t n : {128, 256, 455, 580}) {
      for (int64_t k : {1, 4, 8, 37}) test_gemm(kernels, product, Case(m, n, k, random));
    }
  }
  for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 17, 32}) {
    for (int64_t n : {0, 1, 7, 8, 16, 17, 32, 33, 63, 64, 65, 129}) {
      for (int64_t k : {0, 1, 3, 4, 5, 31, 64, 65}) {
        test_gemm(kernels, product, Case(m, n, k, random));
      }
    }
  }
  test_gemm(kernels, product, Case(7, 65, 1027, random));
  // Around the tiles of a matrix unit, and its remainders of one and of two tiles.
  for (int64_t m : {16, 31, 33, 48, 49, 65}) {
    for (int64_t n : {31, 96, 97}) {
      for (int64_t k : {63, 128, 191}) test_gemm(kernels, product, Case(m, n, k, random));
    }
  }
  test_gemm(kernels, product, Case(33, 1100, 1027, random));  // more panels than a window holds
  for (int64_t m : {1, 2, 4, 6}) test_gemm(kernels, product, Case(m, 600, 1027, random));
  // Weights that outgrow the L2 cache have tiles of their own.
  for (int64_t m : {8, 11, 13}) {
    test_gemm(kernels, product, Case(m, 1090, 1025, random));
  }
  // The largest sums: bytes of 255 times weights of -128, which other libraries' checkpoints hold.
  Case largest(6, 2, kMaxK, random);
  largest.q.assign(largest.q.size(), 255);
  largest.weight.assign(largest.weight.size(), -128);
  for (int32_t zero_point : {0, 255}) {
    largest.zero_point.assign(largest.zero_point.size(), zero_point);
    test_gemm(kernels, product, largest);
  }
  // The largest sums of two and four products, next to each other.
  Case extreme(13, 70, 260, random);
  for (uint8_t& q : extreme.q) q = random() % 2 == 0 ? 0 : 255;
  for (int8_t& weight : extreme.weight) weight = random() % 2 == 0 ? -128 : 127;
  test_gemm(kernels, product, extreme);
  for (int64_t k = 0; k < 140; ++k) {
    test_quantize(kernels, product, k, false, 8, random);
    test_quantize(kernels, product, k, true, 8, random);
    test_quantize(kernels, product, k, false, 16, random);
  }
  for (int64_t k : {511, 512, 513, 515, 1024, 1025}) {
    for (int bits : {8, 16}) test_quantize(kernels, product, k, false, bits, random);
  }
}

// What reads vectors of T as they lie in memory.
template <class T>
void test_products_in_floats(const Kernels& kernels, std::mt19937& random) {
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

void test_kernels(const Kernels& kernels) {
  std::mt19937 random(1);
  for (int64_t k = 0; k < 140; ++k) {
    for (bool symmetric : {false, true}) test_quantize_vectors(kernels, k, symmetric, random);
  }
  for (int64_t dim = 0; dim < 140; ++dim) {
    for (int bits : {4, 8}) test_embedding(kernels, dim, bits, random);
  }
  test_products_in_floats<float>(kernels, random);
  test_products_in_floats<Bfloat16>(kernels, random);
  test_products_in_floats<Half>(kernels, random);
  test_products_in_floats<int8_t>(kernels, random);
  test_product(kernels, kernels.product, random);
  if (kernels.many_rows != nullptr) test_product(kernels, *kernels.many_rows, random);
  test_16_bits<Bfloat16>(kernels, Dtype::bf16);
  test_16_bits<Half>(kernels, Dtype::f16);
  for (int64_t n = 0; n < 70; ++n) {
    test_activate(kernels, n, random);
    test_gates(kernels, n, random);
    test_rows_of_blocks(kernels, n, random);
    test_pack_transposed(kernels, n, 30, random);
    test_pack_transposed(kernels, n, 70, random);
  }
  for (int64_t n : {127, 128, 129, 191, 192, 200, 1000}) {  // registers eight at a time, then four
    test_activate(kernels, n, random);
    test_rows_of_blocks(kernels, n, random);
  }
  test_activate(kernels, 100000, random);
}

void test_plain_tiles() {
  Kernels kernels = *plain_4x7x40();
  kernels.name = "plain tiles";
  std::mt19937 random(2);
  test_product(kernels, *plain_tiles(), random);
}

// Where a signal handler emulates AMX: how much of its machine code has run by now, and whether the
// emulation can be believed.
void test_trap() {
  if (find_kernels("amx_trapped") == nullptr) return;
  const AmxTrapCounts& counts = amx_trap_counts;
  std::printf(
      "amx_trapped: emulated %ld LDTILECFG, %ld TILEZERO, %ld TILELOADD, %ld TDPBUSD, "
      "%ld TILESTORED, %ld TILERELEASE\n",
      counts.ldtilecfg.load(), counts.tilezero.load(), counts.tileload.load(),
      counts.tdpbusd.load(), counts.tilestored.load(), counts.tilerelease.load());
  expect(counts.tdpbusd > 0 && counts.tilerelease > 0, "amx_trapped", "count", 0, 0, 0);
  expect(amx_trap_failures() == 0, "amx_trapped", "emulation", 0, 0, 0);
}

}  // namespace

int main() {
  test_float_env();
  const FloatEnv env;
  int count = 0;
  const IsaEntry* entries = isa_entries(&count);
  for (int i = 0; i < count; ++i) {
    const char* name = entries[i].kernels()->name;
    if (const char* reason = entries[i].missing()) {
      std::printf("%s: not run, %s\n", name, reason);
      continue;
    }
    test_kernels(*entries[i].kernels());
    std::printf("%s: run\n", name);
  }
  test_trap();
  test_plain_tiles();
  for (const Kernels* plain : {plain_1x3x7(), plain_2x5x9(), plain_4x7x40()}) test_kernels(*plain);
  std::printf("%ld comparisons, %d failures\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}
