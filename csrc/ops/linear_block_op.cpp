// linear_block: norm, product, activation, residual, norm, in blocks of rows that stay in the L2
// cache.
#include "linear_block.h"
#include "ops.h"

namespace dynquant {
namespace {

class LinearBlock {
 public:
  LinearBlock(BlockRows rows, Int8Product linear, int64_t activation)
      : rows_(std::move(rows)),
        linear_(std::move(linear)),
        activation_(check_activation(activation, "activation")) {}

  Tensor run() {
    return rows_.run(
        size_of(linear_, {}), [&] { run_phases(); },
        [&](const Product& product, int64_t parts) { run_blocks(product, parts); });
  }

 private:
  void run_blocks(const Product& product, int64_t parts) const {
    const int64_t staged = staged_stride(product.layout, groups_of(linear_.k()));
    const int64_t row_bytes = rows_.normed_bytes(1) + staged * (rows_.scheme.bits / 8) +
                              (linear_.k() + linear_.n()) * rows_.bytes;
    run_row_blocks(product, rows_.in.m, parts, row_bytes,
                   [&](int64_t begin, int64_t end) { run_block(product, begin, end); });
  }

  void run_block(const Product& product, int64_t begin, int64_t end) const {
    const int64_t m = end - begin;
    Pieces pieces(Purpose::block, {rows_.normed_bytes(m)});
    const Rows in = rows_.begin(begin, m, pieces.next(rows_.normed_bytes(m)));
    const StagedBlock staged(product, rows_.source(in), in.k, 0, m, Purpose::staged_rows);
    staged.multiply(linear_.weight, linear_.to(rows_.out(begin), linear_.n(), rows_.dtype));
    finish(begin, end);
  }

  // One step after the other, each on all threads.
  void run_phases() const {
    const Rows in = rows_.begin_all();
    multiply(rows_.kernels, rows_.source(in), in.m, linear_.weight,
             linear_.to(rows_.out(0), linear_.n(), rows_.dtype), rows_.bytes);
    run_range(in.m, linear_.n() * 16, [&](int64_t begin, int64_t end) { finish(begin, end); });
  }

  // What follows the product, of some rows of the output.
  void finish(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end && activation_ != Activation::none; ++row) {
      char* y = rows_.out(row);
      rows_.kernels.activate({activation_, rows_.dtype, y, nullptr, linear_.n(), y});
    }
    rows_.finish(begin, end);
  }

  BlockRows rows_;
  const Int8Product linear_;
  const Activation activation_;
};

}  // namespace

Tensor linear_block(const Tensor& x, Int8Product linear, int64_t activation, BlockEnds ends) {
  BlockRows rows(x, linear, linear.n(), std::move(ends));
  return LinearBlock(std::move(rows), std::move(linear), activation).run();
}

Tensor linear_block(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                    const std::optional<Tensor>& bias, int64_t activation,
                    const std::optional<Tensor>& residual, int64_t norm_before,
                    const std::optional<Tensor>& norm_before_weight,
                    const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
                    int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
                    const std::optional<Tensor>& norm_after_bias, double norm_after_eps,
                    bool per_token, bool symmetric, int64_t activation_bits, bool residual_last) {
  Int8Product linear(packed, weight_scale, bias, {});
  BlockEnds ends(linear.k(), linear.n(), residual, norm_before, norm_before_weight,
                 norm_before_bias, norm_before_eps, norm_after, norm_after_weight, norm_after_bias,
                 norm_after_eps, per_token, symmetric, activation_bits, residual_last);
  return linear_block(x, std::move(linear), activation, std::move(ends));
}

}  // namespace dynquant
