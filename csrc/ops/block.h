// What the ops of whole blocks share: pieces of memory, rows in them, runs of rows.
#pragma once

#include <initializer_list>

#include "activation.h"
#include "gemm_driver.h"
#include "int8_product.h"
#include "row_norm.h"

namespace dynquant {

// Rows of values without a tensor of their own.
inline Rows rows_at(void* data, int64_t m, int64_t k, int64_t stride_bytes) {
  Rows rows{};
  rows.data = static_cast<const char*>(data);
  rows.m = m;
  rows.k = k;
  rows.stride = stride_bytes;
  return rows;
}

// The calling thread's memory for a block, cut into pieces that begin at cache lines.
class Pieces {
 public:
  Pieces(Purpose purpose, std::initializer_list<int64_t> bytes) {
    int64_t total = 0;
    for (int64_t piece : bytes) total += rounded(piece);
    at_ = scratch(static_cast<size_t>(total), purpose);
  }
  template <class T = char>
  T* next(int64_t count) {
    uint8_t* piece = at_;
    at_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(piece);
  }

 private:
  static int64_t rounded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }
  uint8_t* at_;
};

// Rows [first, first + m) of a source, staged for products one after the other.
class StagedBlock {
 public:
  template <class Source>
  StagedBlock(const Product& product, const Source& source, int64_t k, int64_t first, int64_t m,
              Purpose purpose)
      : staged_(m * source.bytes()), rows_(product, k, staged_, source.bytes(), purpose) {
    rows_.stage(source, first * source.bytes(), 0, staged_);
  }
  void multiply(const Packed& weight, const EpilogueArgs& epilogue) const {
    rows_.multiply(0, staged_, weight, 0, weight.n, epilogue);
  }

 private:
  const int64_t staged_;
  const StagedRows rows_;
};

// f(m) for each of m rows whose `cost` is in bytes or operations, on several threads.
template <class F>
void run_rows(int64_t m, int64_t cost, const F& f) {
  run_range(m, cost, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

inline Tensor checked_residual(const Tensor& residual, const Tensor& x, int64_t last) {
  check_tensor(residual, "residual", {x.scalar_type()});
  const std::vector<int64_t> wanted = leading_shape(x, last);
  const auto given = residual.sizes();
  check(std::vector<int64_t>(given.begin(), given.end()) == wanted,
        "residual must have the shape of the result, got ", ShapeOf(residual));
  return residual;
}

}  // namespace dynquant
