// The CUDA kernels on the host: the same templates that nvcc compiles, run by an emulator
// (emulated_gpu.h), against loops in plain C++ and the scalar CPU kernels. It shows that the index
// arithmetic, the pipeline of copies and the sequence of kernels are right; it cannot show that the
// instructions of nvidia.cuh do what the emulator says. `brief` asks for a part of the cases, for
// the sanitizers, under which an emulated thread is slow.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/float_env.h"
#include "../../csrc/cpu/pack.h"
#include "../../csrc/cpu/sets.h"
#include "../../csrc/cuda/calls.inl.h"
#include "emulated_gpu.h"

using namespace dynquant;

namespace {

int failures = 0;
long comparisons = 0;
bool brief = false;

void expect(bool holds, const char* what, long m, long n, long k) {
  ++comparisons;
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("%s differs at M=%ld N=%ld K=%ld\n", what, m, n, k);
}

bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

// Memory as the kernels require it: aligned, and of exactly its size for the sanitizers.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, uint8_t fill = 0xAD) : count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    memory_.reset(new (std::align_val_t{64}) uint8_t[bytes]);
    std::memset(memory_.get(), fill, bytes);
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  int64_t count_;
  std::unique_ptr<uint8_t[], Free> memory_;
};

std::mt19937& random_source() {
  static std::mt19937 source(1);
  return source;
}

Buffer<int8_t> packed_on_cpu(const std::vector<int8_t>& weight, int64_t n, int64_t k) {
  Buffer<int8_t> packed(packed_bytes(n, k));
  pack_header(packed.data(), n, k);
  for (int64_t p = 0; p < panels_of(n); ++p) {
    pack_panel(weight.data(), k, n, k, p, packed.data());
  }
  return packed;
}

struct Product {
  int64_t m, n, k;
  bool is_signed;
  Buffer<uint8_t> q;
  std::vector<int8_t> weight;
  Buffer<int8_t> packed;
  Buffer<int32_t> zero_point;
  Buffer<float> scale, weight_scale, bias;

  static int64_t stride(int64_t k) { return ceil_div(k, 16) * 16; }

  Product(int64_t m_, int64_t n_, int64_t k_, bool signed_bytes)
      : m(m_),
        n(n_),
        k(k_),
        is_signed(signed_bytes),
        q(m_ * stride(k_)),
        weight(drawn_weight(n_, k_)),
        packed(packed_on_cpu(weight, n_, k_)),
        zero_point(m_),
        scale(m_),
        weight_scale(n_),
        bias(n_) {
    std::mt19937& random = random_source();
    std::normal_distribution<float> real;
    for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(random());
    const int lowest = is_signed ? -128 : 0;
    for (int64_t i = 0; i < m; ++i) zero_point[i] = lowest + static_cast<int>(random() % 256);
    for (int64_t i = 0; i < m; ++i) scale[i] = std::exp(real(random));
    for (int64_t i = 0; i < n; ++i) weight_scale[i] = std::exp(real(random));
    for (int64_t i = 0; i < n; ++i) bias[i] = real(random);
  }

  static std::vector<int8_t> drawn_weight(int64_t n, int64_t k) {
    std::uniform_int_distribution<int> values(-127, 127);
    std::vector<int8_t> weight(static_cast<size_t>(n * k));
    for (int8_t& value : weight) value = static_cast<int8_t>(values(random_source()));
    return weight;
  }

  int32_t acc(int64_t row, int64_t column) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const uint8_t byte = q[row * stride(k) + i];
      const int value = is_signed ? static_cast<int8_t>(byte) : byte;
      sum += int64_t{value - zero_point[row]} * weight[static_cast<size_t>(column * k + i)];
    }
    return static_cast<int32_t>(sum);
  }

  float result(int64_t row, int64_t column, bool per_channel, bool with_bias) const {
    float y = static_cast<float>(acc(row, column)) * scale[row];
    y *= weight_scale[per_channel ? column : 0];
    return with_bias ? y + bias[column] : y;
  }

  ProductArgs args(Dtype out_dtype, void* out, bool per_channel, bool with_bias) const {
    ProductArgs a = {};
    a.q = q.data();
    a.q_stride = stride(k);
    a.flip = is_signed ? 0x80808080u : 0;
    a.finish = {packed.data(),
                {zero_point.data(), 1},
                is_signed ? 128 : 0,
                {scale.data(), 1},
                weight_scale.data(),
                per_channel,
                with_bias ? bias.data() : nullptr,
                out,
                out_dtype,
                m,
                n,
                k};
    return a;
  }
};

template <bool kAsync>
void test_sums(const Product& c, const Plan& plan) {
  Buffer<int32_t> partial(partial_sums(plan, c.m, c.n)), sums(c.m * c.n);
  const ProductArgs a = c.args(Dtype::i32, sums.data(), true, false);
  product(EmulatedStream<kAsync>(), plan, a, partial.data());
  for (int64_t i = 0; i < sums.size(); ++i) {
    expect(sums[i] == c.acc(i / c.n, i % c.n), "int32 sum", c.m, c.n, c.k);
  }
}

template <bool kAsync, class Out>
void test_results(const Product& c, const Plan& plan, Dtype dtype) {
  const bool per_channel = random_source()() % 2 == 0, with_bias = random_source()() % 2 == 0;
  Buffer<int32_t> partial(partial_sums(plan, c.m, c.n));
  Buffer<Out> y(c.m * c.n);
  const ProductArgs a = c.args(dtype, y.data(), per_channel, with_bias);
  product(EmulatedStream<kAsync>(), plan, a, partial.data());
  for (int64_t i = 0; i < y.size(); ++i) {
    Out wanted;
    narrow(c.result(i / c.n, i % c.n, per_channel, with_bias), &wanted);
    expect(std::memcmp(&y[i], &wanted, sizeof wanted) == 0, "result", c.m, c.n, c.k);
  }
}

template <bool kAsync>
void test_product(const Product& c, const Plan& plan) {
  static int which = 0;
  switch (++which % 4) {
    case 0:
      return test_results<kAsync, float>(c, plan, Dtype::f32);
    case 1:
      return test_results<kAsync, Bfloat16>(c, plan, Dtype::bf16);
    case 2:
      return test_results<kAsync, Half>(c, plan, Dtype::f16);
    default:
      return test_sums<kAsync>(c, plan);
  }
}

template <class Tile>
void test_tile(Method method) {
  const auto test = [method](int64_t m, int64_t n, int64_t k, int parts) {
    static int which = 0;
    const Product c(m, n, k, ++which % 3 == 0);
    test_product<true>(c, {method, parts});
    if (which % 4 == 0) test_product<false>(c, {method, parts});
  };
  test(Tile::kM + 1, Tile::kN + 1, 133, 1);
  test(Tile::kM - 1, Tile::kN - 1, 260, 3);
  if (brief) return;
  for (int64_t m : {1, Tile::kM - 1, Tile::kM, Tile::kM + 1}) {
    for (int64_t n : {1, Tile::kN - 1, Tile::kN, Tile::kN + 1}) test(m, n, 65, 1);
  }
  for (int64_t k : {0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 127, 128, 129, 255, 256, 257, 448, 449}) {
    test(9, 72, k, 1);
  }
  for (int parts : {2, 3, 5}) test(Tile::kM + 1, Tile::kN + 8, 400, parts);
  test(5, 13, 100, 8);  // some parts are empty
}

void test_gemv() {
  for (int64_t m : {1, 2, 3, 4}) {
    for (int64_t n : {1, 63, 64, 65, 130}) {
      for (int64_t k : {0, 1, 4, 15, 16, 17, 255, 256, 257, 1030}) {
        if (brief && (n + k) % 5 != 0) continue;
        for (int parts : {1, 2, 7}) {
          test_product<true>(Product(m, n, k, n % 2 == 0), {Method::gemv, parts});
        }
      }
    }
  }
}

// A weight that is not of the size that its caller takes it for gives no number at all.
void test_foreign_header() {
  const Product c(3, 70, 20, false);
  const EmulatedStream<true> stream;
  ProductArgs a = c.args(Dtype::f32, nullptr, true, true);
  a.finish.k = 19;  // as many groups: the length is the same
  for (Method method : {Method::gemv, Method::least}) {
    for (int parts : {1, 2}) {
      const Plan plan = {method, parts};
      Buffer<int32_t> partial(partial_sums(plan, c.m, c.n));
      Buffer<float> y(c.m * c.n);
      a.finish.out = y.data();
      a.finish.out_dtype = Dtype::f32;
      product(stream, plan, a, partial.data());
      Buffer<int32_t> sums(c.m * c.n);
      a.finish.out = sums.data();
      a.finish.out_dtype = Dtype::i32;
      product(stream, plan, a, partial.data());
      for (int64_t i = 0; i < c.m * c.n; ++i) {
        expect(y[i] != y[i] && sums[i] == kNoSum, "foreign header", c.m, c.n, c.k);
      }
    }
  }
}

void test_indices() {
  for (int row = 0; row < 64; ++row) {
    bool seen[kStepChunks] = {};
    for (int chunk = 0; chunk < kStepChunks; ++chunk) {
      const int at = activation_offset(row, chunk);
      expect(at / kStepK == row && at % kChunk16 == 0, "activation row", row, chunk, 0);
      seen[at % kStepK / kChunk16] = true;
    }
    for (bool chunk : seen) expect(chunk, "activation chunk", row, 0, 0);
  }
  std::vector<bool> taken(2 * kPanelPitch / 4);
  for (int column = 0; column < 2 * kPanelWidth; ++column) {
    for (int group = 0; group < kStepGroups; ++group) {
      const size_t word = static_cast<size_t>(weight_offset(column, group) / 4);
      expect(word < taken.size() && !taken[word], "weight word", column, group, 0);
      taken[word] = true;
    }
  }
  bool sums[kProductRows][kSpanColumns] = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int j = 0; j < kSpanProducts; ++j) {
      for (int i = 0; i < 4; ++i) {
        bool& here = sums[sum_row(lane, i)][sum_column(lane, j, i)];
        expect(!here, "sum of two lanes", lane, j, i);
        here = true;
        // The PTX manual's column of a sum, among those whose weights the lanes hold.
        const int holder = (lane % 4 * 2 + i % 2) * 4;
        expect(sum_column(lane, j, i) == weight_column(holder) + j, "sum column", lane, j, i);
      }
    }
  }
  for (int64_t rows = 1; rows < 20; ++rows) {
    for (int64_t columns = 1; columns < 12; ++columns) {
      std::vector<bool> visited(static_cast<size_t>(rows * columns));
      for (int64_t i = 0; i < rows * columns; ++i) {
        const TileAt at = tile_at(i, rows, columns);
        const bool inside = at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns;
        expect(inside && !visited[static_cast<size_t>(at.row * columns + at.column)], "tile", rows,
               columns, i);
        if (inside) visited[static_cast<size_t>(at.row * columns + at.column)] = true;
      }
    }
  }
}

void test_plans() {
  for (int64_t m : {1, 2, 4, 5, 8, 16, 17, 64, 65, 128, 129, 1000, 4096, 100000}) {
    for (int64_t n : {1, 63, 64, 65, 768, 3072, 50000}) {
      for (int64_t k : {0, 1, 16, 64, 65, 768, 4096, 65536}) {
        for (int64_t processors : {1, 40, 132}) {
          const Plan plan = choose_plan(m, n, k, processors);
          expect(plan.method != Method::gemv || m <= kGemvRows, "plan's method", m, n, k);
          expect(plan.parts >= 1 && (plan.parts == 1 || m <= kMostSplitRows), "plan's parts", m, n,
                 k);
          expect(plan.parts <= 32, "plan's parts", m, n, k);
        }
      }
    }
  }
}

// As the ops call it: float rows, quantized and multiplied by the plan's kernel.
void test_linear(int64_t m, int64_t n, int64_t k, bool symmetric) {
  const EmulatedStream<true> stream;
  Product c(m, n, k, false);
  std::normal_distribution<float> real;
  Buffer<float> x(m * k);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = real(random_source());
  QuantizeRowsArgs a = {};
  a.rows = {x.data(), k * 4, m, k, k % 4 == 0};
  a.rule = symmetric ? Rule::symmetric : Rule::asymmetric;
  a.shift = symmetric ? 128 : 0;
  a.q = c.q.data();
  a.q_stride = a.q_bytes = Product::stride(k);
  a.scale = c.scale.data();
  a.zero_point = c.zero_point.data();
  quantize(stream, Dtype::f32, a, Parameters::own, nullptr);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      const float inv = c.scale[row] == 1 && k == 0 ? 0 : 1 / c.scale[row];
      const float q = std::nearbyint(x[row * k + i] * inv) + static_cast<float>(c.zero_point[row]);
      expect(std::fabs(q - static_cast<float>(c.q[row * Product::stride(k) + i])) <= 1, "staged q",
             m, n, k);
    }
    for (int64_t i = k; i < Product::stride(k); ++i) {
      expect(c.q[row * Product::stride(k) + i] == 0, "staged padding", m, n, k);
    }
  }
  test_product<true>(c, choose_plan(m, n, k, stream.processors()));
}

struct Drawn {
  Dtype dtype;
  int64_t bytes;
};

// Values of a row, of every kind that the specification speaks of.
float drawn_value(int kind) {
  std::mt19937& random = random_source();
  std::normal_distribution<float> real;
  switch (kind) {
    case 0:
      return real(random);
    case 1:
      return std::ldexp(real(random), static_cast<int>(random() % 250) - 140);
    case 2:
      return real(random) * 1e-40f;
    case 3:
      return std::fabs(real(random)) + 1;
    case 4:
      return 0.0f;
    case 5:
      return random() % 50 == 0 ? NAN : real(random);
    case 6:
      return random() % 50 == 0 ? -INFINITY : real(random);
    case 7:
      return real(random) < 0 ? -3e38f : 3e38f;
    default:
      return -std::fabs(real(random));
  }
}
constexpr int kKinds = 9;

template <class T>
void test_quantize(Dtype dtype, int64_t m, int64_t k, int64_t pitch, bool symmetric,
                   Parameters parameters) {
  const Kernels& cpu = *scalar_kernels();
  const EmulatedStream<true> stream;
  Buffer<T> x(m * pitch);
  for (int64_t i = 0; i < m; ++i) {
    const int kind =
        static_cast<int>(random_source()() % (parameters == Parameters::whole ? 4 : 9));
    for (int64_t j = 0; j < pitch; ++j) narrow(drawn_value(kind % kKinds), &x[i * pitch + j]);
  }
  const int64_t counts = parameters == Parameters::own ? m : 1;
  const int64_t stride = k + 3;
  Buffer<uint8_t> q(m * stride), wanted(m * stride);
  Buffer<float> scale(counts);
  Buffer<int32_t> zero_point(counts);
  Buffer<Range> ranges(kMostRanges);
  if (parameters == Parameters::given) {
    scale[0] = 0.031f;
    zero_point[0] = symmetric ? 0 : 77;
  }
  QuantizeRowsArgs a = {};
  const int64_t row_bytes = pitch * static_cast<int64_t>(sizeof(T));
  a.rows = {x.data(), row_bytes, m, k, row_bytes % 16 == 0};
  a.rule = symmetric ? Rule::symmetric : Rule::asymmetric;
  a.q = q.data();
  a.q_stride = stride;
  a.q_bytes = k;
  if (parameters == Parameters::given) {
    a.given_scale = {scale.data(), 0};
    a.given_zero_point = {zero_point.data(), 0};
  } else {
    a.scale = scale.data();
    a.zero_point = zero_point.data();
  }
  quantize(stream, dtype, a, parameters, ranges.data());

  Range whole = {0.0f, 0.0f, false};
  for (int64_t i = 0; i < m; ++i) add_to(whole, cpu.range(&x[i * pitch], dtype, k));
  for (int64_t i = 0; i < m; ++i) {
    const Range own = cpu.range(&x[i * pitch], dtype, k);
    const QParams p = choose_qparams(parameters == Parameters::own ? own : whole, symmetric);
    QuantizeArgs b = quantize_args(p, symmetric, false);
    if (parameters == Parameters::given) {
      b = {};
      b.factor = scale[0];
      b.zero_point = zero_point[0];
      b.q_min = symmetric ? -127 : 0;
      b.q_max = symmetric ? 127 : 255;
    } else {
      const int64_t at = parameters == Parameters::own ? i : 0;
      expect(same(scale[at], p.scale) && zero_point[at] == p.zero_point, "parameters", m, 0, k);
    }
    b.x = &x[i * pitch];
    b.dtype = dtype;
    b.k = k;
    b.q = &wanted[i * stride];
    (parameters == Parameters::given ? cpu.quantize_divide : cpu.quantize)(b);
  }
  // Including what lies between rows, which is not to be written.
  expect(std::memcmp(q.data(), wanted.data(), static_cast<size_t>(q.size())) == 0, "q", m, 0, k);
}

template <class T>
void test_quantize_dtype(Dtype dtype) {
  for (bool symmetric : {false, true}) {
    for (Parameters parameters : {Parameters::own, Parameters::whole, Parameters::given}) {
      for (int64_t k : {0, 1, 3, 4, 7, 8, 9, 31, 32, 33, 511, 512, 513, 2000, 2047, 2048, 2049}) {
        if (brief && k % 3 != 0) continue;
        test_quantize<T>(dtype, 6, k, k + 1, symmetric, parameters);  // rows are not aligned
        test_quantize<T>(dtype, 5, k, ceil_div(k, 8) * 8, symmetric, parameters);
      }
      for (int64_t k : {8192, 9001, 40000}) {
        if (brief && (symmetric || dtype != Dtype::f32)) continue;
        test_quantize<T>(dtype, 2, k, ceil_div(k, 8) * 8, symmetric, parameters);
      }
      test_quantize<T>(dtype, brief ? 10 : 700, 2, 8, symmetric, parameters);
      if (parameters == Parameters::whole) test_quantize<T>(dtype, 0, 5, 5, symmetric, parameters);
    }
  }
}

void test_weight(int64_t n, int64_t k) {
  const EmulatedStream<true> stream;
  std::vector<int8_t> weight = Product::drawn_weight(n, k);
  const Buffer<int8_t> wanted = packed_on_cpu(weight, n, k);
  const int64_t stride = k + 5;
  Buffer<int8_t> given(n * stride), packed(packed_bytes(n, k)), back(n * k);
  for (int64_t i = 0; i < n * k; ++i)
    given[i / k * stride + i % k] = weight[static_cast<size_t>(i)];
  Buffer<int32_t> refused(1, 0);
  pack(stream, PackArgs{given.data(), stride, n, k, packed.data(), refused.data()});
  expect(std::memcmp(packed.data(), wanted.data(), static_cast<size_t>(wanted.size())) == 0,
         "packed", 0, n, k);
  expect(refused[0] == 0, "refusal", 0, n, k);
  unpack(stream, UnpackArgs{packed.data(), n, k, back.data()});
  expect(n * k == 0 || std::memcmp(back.data(), weight.data(), weight.size()) == 0, "unpacked", 0,
         n, k);
  if (n * k == 0) return;
  given[(n - 1) * stride + k - 1] = -128;
  pack(stream, PackArgs{given.data(), stride, n, k, packed.data(), refused.data()});
  expect(refused[0] == 1, "refusal of -128", 0, n, k);
}

void test_quantize_weight(int64_t n, int64_t k, bool per_channel) {
  const Kernels& cpu = *scalar_kernels();
  const EmulatedStream<true> stream;
  Buffer<float> w(n * k), scale(per_channel ? n : 1);
  for (int64_t i = 0; i < n * k; ++i) {
    w[i] = drawn_value(i / k % 4 == 0 && per_channel ? 2 : static_cast<int>(i / k % 3));
  }
  Buffer<uint8_t> q(n * k), wanted(n * k);
  Buffer<Range> ranges(kMostRanges);
  Buffer<int32_t> refused(1, 0);
  QuantizeRowsArgs a = {};
  a.rows = {w.data(), k * 4, n, k, k % 4 == 0};
  a.rule = Rule::weight;
  a.q = q.data();
  a.q_stride = a.q_bytes = k;
  a.scale = scale.data();
  a.refused = refused.data();
  const Parameters parameters = per_channel ? Parameters::own : Parameters::whole;
  quantize(stream, Dtype::f32, a, parameters, ranges.data());
  float most = 0;
  const auto amax = [&](int64_t row) {
    const Range range = cpu.range(&w[row * k], Dtype::f32, k);
    return std::fmax(-range.lo, range.hi);
  };
  for (int64_t i = 0; i < n; ++i) most = std::fmax(most, amax(i));
  for (int64_t i = 0; i < n; ++i) {
    const float s = (per_channel ? amax(i) : most) / 127.0f;
    const bool tiny = s < 0x1p-126f;
    QuantizeArgs b = {};
    b.x = &w[i * k];
    b.k = k;
    b.factor = tiny ? 1.0f : s;
    b.q_min = tiny ? 0 : -127;
    b.q_max = tiny ? 0 : 127;
    b.q = &wanted[i * k];
    cpu.quantize_divide(b);
    expect(same(scale[per_channel ? i : 0], b.factor), "weight scale", 0, n, k);
  }
  expect(std::memcmp(q.data(), wanted.data(), static_cast<size_t>(q.size())) == 0, "weight q", 0, n,
         k);
  expect(refused[0] == 0, "refusal", 0, n, k);
  if (n * k == 0) return;
  for (float bad : {NAN, INFINITY, -INFINITY}) {
    refused[0] = 0;
    w[n * k - 1] = bad;
    quantize(stream, Dtype::f32, a, parameters, ranges.data());
    expect(refused[0] == 1, "refusal of NaN or Inf", 0, n, k);
  }
}

void test_stage(int64_t m, int64_t k) {
  const EmulatedStream<true> stream;
  const int64_t stride = k + 3, staged_stride = ceil_div(k, 16) * 16;
  Buffer<uint8_t> q(m * stride), staged(m * staged_stride);
  for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(random_source()());
  stage(stream, StageArgs{q.data(), stride, m, k, staged.data(), staged_stride});
  for (int64_t i = 0; i < staged.size(); ++i) {
    const int64_t row = i / staged_stride, column = i % staged_stride;
    expect(staged[i] == (column < k ? q[row * stride + column] : 0), "staged bytes", m, 0, k);
  }
}

}  // namespace

int main(int count, char** arguments) {
  brief = count > 1 && std::strcmp(arguments[1], "brief") == 0;
  const FloatEnv env;
  test_indices();
  test_plans();
  test_tile<LargeTile>(Method::large);
  test_tile<WideTile>(Method::wide);
  test_tile<SquareTile>(Method::square);
  test_tile<LowTile>(Method::low);
  test_tile<LeastTile>(Method::least);
  const long conflicts = EmulatedBlock::current().conflicts;
  if (conflicts != 0) std::printf("%ld bank conflicts\n", conflicts);
  failures += conflicts != 0;
  test_gemv();
  test_foreign_header();
  for (int64_t m : {1, 3, 4, 5, 17, 40, 70}) {
    for (int64_t k : {1, 16, 77, 300}) test_linear(m, 100, k, m % 2 == 0);
  }
  test_quantize_dtype<float>(Dtype::f32);
  test_quantize_dtype<Bfloat16>(Dtype::bf16);
  test_quantize_dtype<Half>(Dtype::f16);
  for (int64_t n : {0, 1, 63, 64, 65, 130}) {
    for (int64_t k : {0, 1, 3, 4, 5, 64, 129}) {
      test_weight(n, k);
      test_quantize_weight(n, k, true);
      test_quantize_weight(n, k, false);
    }
  }
  for (int64_t k : {0, 1, 15, 16, 17, 1100}) test_stage(3, k);
  std::printf("CUDA kernels on the host: %ld comparisons, %d failures\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}
