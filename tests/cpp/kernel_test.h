// kernel_test's parts: each compares some kernels of a set with loops that say the same in plain
// C++. Every buffer is allocated at its exact size.
#pragma once

#include <cstring>
#include <random>

#include "kernels.h"

namespace dynquant {

// Counts a comparison, and says where it failed.
void expect(bool holds, const char* isa, const char* what, long m, long n, long k);

inline bool same(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b);
}

// Of one way to multiply staged rows, quantization into them included.
void test_product(const Kernels& kernels, const Product& product, std::mt19937& random);
void test_staging(const Kernels& kernels, const Product& product, std::mt19937& random);

// Of all sets.
void test_packing(const Kernels& kernels, std::mt19937& random);
void test_quantization(const Kernels& kernels, std::mt19937& random);
void test_products_in_floats(const Kernels& kernels, std::mt19937& random);
void test_rows(const Kernels& kernels, std::mt19937& random);
void test_gates(const Kernels& kernels, std::mt19937& random);
void test_mixers(const Kernels& kernels, std::mt19937& random);
void test_embeddings(const Kernels& kernels, std::mt19937& random);

}  // namespace dynquant
