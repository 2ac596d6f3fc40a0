// Products of staged rows and packed weights, and packing.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "amx_trap.h"
#include "kernel_test.h"
#include "layout.h"
#include "pack.h"
#include "staged.h"

namespace dynquant {
namespace {

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

}  // namespace

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
  test_staging(kernels, product, random);
}

void test_packing(const Kernels& kernels, std::mt19937& random) {
  for (int64_t n = 0; n < 70; ++n) {
    test_pack_transposed(kernels, n, 30, random);
    test_pack_transposed(kernels, n, 70, random);
  }
}

}  // namespace dynquant
