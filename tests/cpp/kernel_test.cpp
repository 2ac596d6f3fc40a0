// The kernels against loops that say the same in plain C++, without torch or Python: for every
// instruction set that runs here, and for plain sets of odd widths and tiles that no processor has.
// Built with the sanitizers by `make sanitize`.
#include "kernel_test.h"

#include <cfenv>
#include <cstdio>

#include "amx_trap.h"
#include "amx_trap_test.h"
#include "costs.h"
#include "dispatch.h"
#include "float_env.h"
#include "plain_sets.h"
#include "sets.h"

namespace dynquant {
namespace {

int failures = 0;
long comparisons = 0;

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

void test_kernels(const Kernels& kernels) {
  std::mt19937 random(1);
  test_quantization(kernels, random);
  test_embeddings(kernels, random);
  test_products_in_floats(kernels, random);
  test_product(kernels, kernels.product, random);
  if (kernels.unit_product != nullptr) test_product(kernels, *kernels.unit_product, random);
  test_rows(kernels, random);
  test_gates(kernels, random);
  test_mixers(kernels, random);
  test_packing(kernels, random);
}

// Which of two products is used: what is set up once pays for many values, and for none where it
// never gets less.
void test_choice() {
  const auto with = [](const Costs& costs) {
    Product product = {};
    product.costs = costs;
    return product;
  };
  const Product fast = with({1.0, 4.0, 1.0, 1000.0});
  Kernels kernels = {};
  kernels.product = with({10.0, 4.0, 1.0, 10.0});
  const auto uses_unit = [&](int64_t m, int64_t n, int64_t k) {
    return &product_for(kernels, m, n, k) == kernels.unit_product;
  };
  expect(!uses_unit(1000, 1000, 1000), "choice", "no unit", 1000, 1000, 1000);
  kernels.unit_product = &fast;
  kernels.unit_start = 1e6;
  expect(uses_unit(1000, 1000, 1000), "choice", "many values", 1000, 1000, 1000);
  expect(!uses_unit(8, 64, 64), "choice", "few values", 8, 64, 64);
  expect(!uses_unit(100000, 64, 1), "choice", "few k", 100000, 64, 1);
  expect(!uses_unit(0, 64, 64), "choice", "nothing", 0, 64, 64);
  kernels.unit_start = kAlways;
  expect(uses_unit(1, 1, 1), "choice", "always", 1, 1, 1);
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

int run_all() {
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
  test_choice();
  test_plain_tiles();
  for (const Kernels* plain : {plain_1x3x7(), plain_2x5x9(), plain_4x7x40()}) test_kernels(*plain);
  std::printf("%ld comparisons, %d failures\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

void expect(bool holds, const char* isa, const char* what, long m, long n, long k) {
  ++comparisons;
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("%s: %s differs at M=%ld N=%ld K=%ld\n", isa, what, m, n, k);
}

}  // namespace dynquant

int main() { return dynquant::run_all(); }
