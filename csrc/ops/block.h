// What the ops of whole blocks share: rows in their memory, runs of rows.
#pragma once

#include "activation.h"
#include "cache.h"
#include "gemm_driver.h"
#include "int8_product.h"
#include "ops.h"
#include "pieces.h"
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

// Rows [first, first + m) of a source, staged for products one after the other.
class StagedBlock {
 public:
  template <class Source>
  StagedBlock(const Product& product, const Source& source, int64_t k, int64_t first, int64_t m,
              Purpose purpose)
      : staged_(m * source.bytes()), rows_(product, k, staged_, source.bytes(), purpose) {
    rows_.stage(source, first * source.bytes(), 0, staged_);
  }
  void multiply(const Packed& weight, const EpilogueArgs& epilogue,
                const int8_t* next = nullptr) const {
    const bool is_far = reads_far(staged_, weight.panels, weight.n * weight.k);
    rows_.multiply(0, staged_, weight, 0, weight.n, epilogue, is_far, next);
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

// f(begin, end) for blocks of the rows [0, m), each of `row_bytes` that should stay in the L2
// cache, in as many tasks as `parts`. Every block reads the weights again: blocks of much fewer
// rows than least_rows take up to 1.6 times as long as those that outgrow the cache, and blocks of
// half as many 1.01 to 1.08 times. With 2 MiB of it, 192 rows were 1.05 to 1.15 times as fast as
// 128 where AMX multiplies, and as fast where AVX512-VNNI does.
template <class F>
void run_row_blocks(const Product& product, int64_t m, int64_t parts, int64_t row_bytes,
                    const F& f) {
  const int64_t least_rows = half_of_l2() < 1024 * 1024 ? 128 : 192;
  const int64_t multiple = product.row_multiple, units = ceil_div(m, multiple);
  const int64_t block_units =
      std::max<int64_t>(1, std::max(least_rows, half_of_l2() / row_bytes) / multiple);
  run_tasks(parts, [&](int64_t part) {
    const int64_t first = units * part / parts, last = units * (part + 1) / parts;
    const int64_t blocks = ceil_div(last - first, block_units);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = first + (last - first) * b / blocks;
      const int64_t end = first + (last - first) * (b + 1) / blocks;
      f(begin * multiple, std::min(m, end * multiple));
    }
  });
}

inline Tensor checked_residual(const Tensor& residual, const Tensor& x,
                               const std::vector<int64_t>& wanted) {
  check_tensor(residual, "residual", {x.scalar_type()});
  const auto given = residual.sizes();
  check(std::vector<int64_t>(given.begin(), given.end()) == wanted,
        "residual must have the shape of the result, got ", ShapeOf(residual));
  return residual;
}

// The arguments that every op of a block ends with: what becomes of rows of k values before the
// first product and of rows of n after the last, and how rows are quantized. The residual is added
// before the norm after the last product, or, with residual_last, behind it.
struct BlockEnds {
  BlockEnds(int64_t k, int64_t n, const std::optional<Tensor>& residual_, int64_t norm_before,
            const std::optional<Tensor>& norm_before_weight,
            const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
            int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
            const std::optional<Tensor>& norm_after_bias, double norm_after_eps, bool per_token,
            bool symmetric, int64_t activation_bits, bool residual_last_ = false)
      : scheme(per_token, symmetric, activation_bits, "activation_bits"),
        before(norm_before, norm_before_weight, norm_before_bias, norm_before_eps, k, kNormBefore),
        after(norm_after, norm_after_weight, norm_after_bias, norm_after_eps, n, kNormAfter),
        residual(residual_),
        residual_last(residual_last_) {}

  ActivationScheme scheme;
  RowNorm before, after;
  std::optional<Tensor> residual;
  bool residual_last;
};

// The rows of a block's input and output, and what becomes of them at its ends: a norm before the
// first product; a residual and a norm after the last, in place.
class BlockRows {
 public:
  // From the K of the product `first` to n columns.
  BlockRows(const Tensor& x, const Int8Product& first, int64_t n, BlockEnds ends)
      : kernels(kernels_in_use()),
        dtype(check_float(x, "x")),
        bytes(static_cast<int64_t>(x.element_size())),
        type(x.scalar_type()),
        in(checked_rows(x, first)),
        scheme(ends.scheme),
        before_(std::move(ends.before)),
        after_(std::move(ends.after)),
        residual_last_(ends.residual_last),
        row_bytes_(n * bytes),
        shape_(leading_shape(x, n)) {
    if (ends.residual.has_value()) {
      residual_ = rows_of(checked_residual(*ends.residual, x, shape_), "residual");
    }
  }

  // Makes the output; called once all arguments of the op are checked.
  Tensor make_output() {
    Tensor y = empty(shape_, type);
    out_ = static_cast<char*>(y.mutable_data_ptr());
    return y;
  }

  // What products of all rows take on one thread.
  double nanoseconds(const Product& product, const ProductSize& size) const {
    return product_nanoseconds(in.m, size.n, size.k, product.costs);
  }

  // Into how many parts the rows are split where each block of them is taken from the beginning to
  // the end by one thread. 0 where it is one step after the other instead, each on all threads:
  // columns are split where rows are few, and ranges over the whole tensor need it whole.
  int64_t parts_of_rows(const Product& product, const ProductSize& size) const {
    if (!scheme.per_token) return 0;
    const Split split =
        choose_split(in.m, size.n, size.k, num_threads(), product.costs, product.row_multiple);
    return split.columns > 1 ? 0 : split.rows;
  }

  // The block's output: made, and filled by `phases()`, or by `blocks(product, parts)` in that many
  // parts of the rows. `size` is that of its products.
  template <class Phases, class Blocks>
  Tensor run(const ProductSize& size, const Phases& phases, const Blocks& blocks) {
    const Tensor y = make_output();
    if (in.m == 0 || row_bytes_ == 0) return y;
    const Product& product = product_for(kernels, in.m, size.n, size.k);
    const int64_t parts = parts_of_rows(product, size);
    if (parts == 0) {
      with_team(nanoseconds(product, size), phases);
    } else {
      blocks(product, parts);
    }
    return y;
  }

  // What `begin` needs for m rows.
  int64_t normed_bytes(int64_t m) const { return before_.is_none() ? 0 : m * in.k * bytes; }
  // The input's rows [first, first + m), normed into that memory where there is a norm.
  Rows begin(int64_t first, int64_t m, char* normed) const {
    const char* x = in.data + first * in.stride;
    if (before_.is_none()) return rows_at(const_cast<char*>(x), m, in.k, in.stride);
    const int64_t stride = in.k * bytes;
    before_.apply(kernels, dtype, x, nullptr, normed, m, in.stride, 0, stride);
    return rows_at(normed, m, in.k, stride);
  }
  // All of them, on all threads.
  Rows begin_all() const {
    if (before_.is_none()) return in;
    Rows rows = in;
    rows.holder = empty({in.m, in.k}, type);
    rows.stride = in.k * bytes;
    char* normed = static_cast<char*>(rows.holder.mutable_data_ptr());
    run_range(in.m, in.k * 8, [&](int64_t first, int64_t end) {
      begin(first, end - first, normed + first * rows.stride);
    });
    rows.data = normed;
    return rows;
  }

  char* out(int64_t m) const { return out_ + m * row_bytes_; }
  void finish(int64_t begin, int64_t end) const {
    if (ends_plain()) return;
    const int64_t stride = residual_.has_value() ? residual_->stride : 0;
    const char* residual = residual_.has_value() ? residual_->data + begin * stride : nullptr;
    const auto apply = [&](const RowNorm& norm, const char* added) {
      norm.apply(kernels, dtype, out(begin), added, out(begin), end - begin, row_bytes_, stride,
                 row_bytes_);
    };
    apply(after_, residual_last_ ? nullptr : residual);
    constexpr int64_t kNone = 0;  // a norm that adds the residual alone
    if (residual_last_) {
      apply(RowNorm(kNone, std::nullopt, std::nullopt, 0.0, row_bytes_ / bytes), residual);
    }
  }
  void finish_all() const {
    if (ends_plain()) return;
    run_range(in.m, row_bytes_ * 8 / bytes,
              [&](int64_t begin, int64_t end) { finish(begin, end); });
  }

  FloatRows source(const Rows& rows) const {
    return {kernels, rows, dtype, scheme, scheme.whole(kernels, rows, dtype)};
  }

  const Kernels& kernels;
  const Dtype dtype;
  const int64_t bytes;
  const ScalarType type;
  const Rows in;
  const ActivationScheme scheme;

 private:
  static Rows checked_rows(const Tensor& x, const Int8Product& first) {
    check(x.dim() == 0 || x.size(x.dim() - 1) == first.k(), "x must have K = ", first.k(),
          " as its last dimension, like ", first.name, ", got ", ShapeOf(x));
    return rows_of(x, "x");
  }

  bool ends_plain() const { return !residual_.has_value() && after_.is_none(); }

  const RowNorm before_, after_;
  const bool residual_last_;
  const int64_t row_bytes_;
  std::optional<Rows> residual_;
  const std::vector<int64_t> shape_;  // of the output
  char* out_ = nullptr;
};

}  // namespace dynquant
