// feed_forward: norm, up and gate products, activation, down product, residual, norm, in blocks of
// rows that stay in the L2 cache.
#include "block.h"
#include "cache.h"
#include "ops.h"

namespace dynquant {
namespace {

constexpr ColumnNames kUp = {"packed_up", "weight_scale_up", "bias_up"};
constexpr ColumnNames kGate = {"packed_gate", "weight_scale_gate", "bias_gate"};
constexpr ColumnNames kDown = {"packed_down", "weight_scale_down", "bias_down"};

// Where a row of the hidden layer holds what the activation takes and what it is multiplied by.
struct Hidden {
  int64_t width;
  int64_t activated;
  int64_t by;  // -1: nothing
};

class FeedForward {
 public:
  FeedForward(const Tensor& x, Int8Product up, std::optional<Int8Product> gate, Int8Product down,
              int64_t activation, int64_t split, const std::optional<Tensor>& residual,
              RowNorm before, RowNorm after, const ActivationScheme& scheme)
      : kernels_(kernels_in_use()),
        dtype_(check_float(x, "x")),
        bytes_(static_cast<int64_t>(x.element_size())),
        type_(x.scalar_type()),
        rows_(rows_of(x, "x")),
        up_(std::move(up)),
        gate_(std::move(gate)),
        down_(std::move(down)),
        activation_(check_activation(activation, "activation")),
        hidden_(hidden_of(split)),
        before_(std::move(before)),
        after_(std::move(after)),
        scheme_(scheme) {
    check(rows_.k == up_.k(), "x must have K = ", up_.k(), " as its last dimension, like ",
          up_.name, ", got ", ShapeOf(x));
    if (gate_.has_value()) {
      check(gate_->k() == up_.k(), gate_->name, " must have K = ", up_.k(), ", like ", up_.name,
            ", got ", gate_->k());
    }
    if (residual.has_value()) {
      residual_ = rows_of(checked_residual(*residual, x, down_.n()), "residual");
    }
    y_ = empty(leading_shape(x, down_.n()), type_);
    out_ = static_cast<char*>(y_.mutable_data_ptr());
  }

  Tensor run() {
    if (rows_.m == 0 || down_.n() == 0) return y_;
    const Product& product = product_for(kernels_, rows_.m);
    const Split split =
        choose_split(rows_.m, up_.n(), up_.k(), num_threads(), product.costs, product.row_multiple);
    // Columns are split where the rows are few; and ranges over the whole tensor need it whole.
    if (!scheme_.per_token || split.columns > 1) {
      run_phases();
    } else {
      run_blocks(product, split.rows);
    }
    return y_;
  }

 private:
  Hidden hidden_of(int64_t split) const {
    const int64_t f = down_.k();
    check(split >= 0 && split <= 2,
          "split must be 0, 1 (packed_up holds the gate and what it multiplies) or 2 (the other "
          "way round), got ",
          split);
    check(split == 0 || !gate_.has_value(), "split = ", split, " says that ", up_.name,
          " holds the gate, but packed_gate is given too");
    const int64_t wanted = split == 0 ? f : 2 * f;
    check(up_.n() == wanted, up_.name, " must have N = ", wanted, ", from the K of ", down_.name,
          ", got ", up_.n());
    if (!gate_.has_value() && split == 0) return {f, 0, -1};
    if (gate_.has_value()) {
      check(gate_->n() == f, gate_->name, " must have N = ", f, ", like ", up_.name, ", got ",
            gate_->n());
    }
    return split == 2 ? Hidden{2 * f, f, 0} : Hidden{2 * f, 0, f};
  }

  FloatRows source(const Rows& rows) const {
    return {kernels_, rows, dtype_, scheme_, scheme_.whole(kernels_, rows, dtype_)};
  }

  // The activation of one row of the hidden layer, in place.
  void activate(char* row) const {
    char* x = row + hidden_.activated * bytes_;
    const char* by = hidden_.by < 0 ? nullptr : row + hidden_.by * bytes_;
    kernels_.activate({activation_, dtype_, x, by, down_.k(), x});
  }

  Rows activated_rows(char* hidden, int64_t m) const {
    return rows_at(hidden + hidden_.activated * bytes_, m, down_.k(), hidden_.width * bytes_);
  }

  // Where `up` writes: beside the gate's values, or over the whole row where it has both.
  char* up_out(char* hidden) const {
    return gate_.has_value() ? hidden + hidden_.by * bytes_ : hidden;
  }

  // Rows of the hidden layer, each activated as it is staged: it is in the L1 cache then.
  struct ActivatedRows {
    const FeedForward& block;
    char* hidden;
    FloatRows rows;

    int64_t bytes() const { return rows.bytes(); }
    StagedRow stage(const Product& product, int64_t m, uint8_t* staged, uint8_t* low) const {
      block.activate(hidden + m * block.hidden_.width * block.bytes_);
      return rows.stage(product, m, staged, low);
    }
  };

  const char* input_row(int64_t m) const { return rows_.data + m * rows_.stride; }
  char* output_row(int64_t m) const { return out_ + m * down_.n() * bytes_; }

  // Residual and norm of a row of the result, in place.
  void finish(int64_t m) const {
    const char* residual =
        residual_.has_value() ? residual_->data + m * residual_->stride : nullptr;
    if (residual == nullptr && after_.is_none()) return;
    after_.apply(kernels_, dtype_, output_row(m), residual, output_row(m));
  }

  // Every task takes rows of its own from the beginning to the end.
  void run_blocks(const Product& product, int64_t parts) const {
    const int64_t normed = before_.is_none() ? 0 : rows_.k * bytes_;
    const int64_t staged = std::max(staged_stride(product.layout, groups_of(rows_.k)),
                                    staged_stride(product.layout, groups_of(down_.k())));
    const int64_t row_bytes =
        normed + staged * (scheme_.bits / 8) + (hidden_.width + rows_.k + down_.n()) * bytes_;
    const int64_t multiple = product.row_multiple, units = ceil_div(rows_.m, multiple);
    const int64_t block_units =
        std::max<int64_t>(1, std::max<int64_t>(kLeastRows, half_of_l2() / row_bytes) / multiple);
    run_tasks(parts, [&](int64_t part) {
      const int64_t first = units * part / parts, last = units * (part + 1) / parts;
      const int64_t blocks = ceil_div(last - first, block_units);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = first + (last - first) * b / blocks;
        const int64_t end = first + (last - first) * (b + 1) / blocks;
        run_block(product, begin * multiple, std::min(rows_.m, end * multiple));
      }
    });
  }

  static constexpr int64_t kLeastRows = 16;

  void run_block(const Product& product, int64_t begin, int64_t end) const {
    const int64_t m = end - begin, hidden_bytes = m * hidden_.width * bytes_;
    const int64_t normed_bytes = before_.is_none() ? 0 : m * rows_.k * bytes_;
    Pieces pieces(Purpose::block, {hidden_bytes, normed_bytes});
    char* hidden = pieces.next(hidden_bytes);
    Rows in = rows_at(const_cast<char*>(input_row(begin)), m, rows_.k, rows_.stride);
    if (!before_.is_none()) {
      char* normed = pieces.next(normed_bytes);
      for (int64_t r = 0; r < m; ++r) {
        before_.apply(kernels_, dtype_, input_row(begin + r), nullptr,
                      normed + r * rows_.k * bytes_);
      }
      in = rows_at(normed, m, rows_.k, rows_.k * bytes_);
    }
    {
      const StagedBlock staged(product, source(in), rows_.k, 0, m, Purpose::staged_rows);
      staged.multiply(up_.weight, up_.to(up_out(hidden), hidden_.width, dtype_));
      if (gate_.has_value()) {
        staged.multiply(gate_->weight, gate_->to(hidden, hidden_.width, dtype_));
      }
    }
    const ActivatedRows activated = {*this, hidden, source(activated_rows(hidden, m))};
    const StagedBlock staged(product, activated, down_.k(), 0, m, Purpose::staged_rows);
    staged.multiply(down_.weight, down_.to(output_row(begin), down_.n(), dtype_));
    for (int64_t row = begin; row < end; ++row) finish(row);
  }

  // One step after the other, each on all threads.
  void run_phases() const {
    const int64_t m = rows_.m;
    Rows in = rows_;
    if (!before_.is_none()) {
      in.holder = empty({m, rows_.k}, type_);
      char* normed = static_cast<char*>(in.holder.mutable_data_ptr());
      in.stride = rows_.k * bytes_;
      run_rows(m, rows_.k * 8, [&](int64_t r) {
        before_.apply(kernels_, dtype_, input_row(r), nullptr, normed + r * in.stride);
      });
      in.data = normed;
    }
    Tensor holder = empty({m, hidden_.width}, type_);
    char* hidden = static_cast<char*>(holder.mutable_data_ptr());
    multiply_by(in, up_, up_out(hidden), hidden_.width);
    if (gate_.has_value()) multiply_by(in, *gate_, hidden, hidden_.width);
    run_rows(m, down_.k() * 16, [&](int64_t r) { activate(hidden + r * hidden_.width * bytes_); });
    multiply_by(activated_rows(hidden, m), down_, out_, down_.n());
    run_rows(m, down_.n() * 8, [&](int64_t r) { finish(r); });
  }

  void multiply_by(const Rows& rows, const Int8Product& by, char* out, int64_t stride) const {
    multiply(kernels_, source(rows), rows.m, by.weight, by.to(out, stride, dtype_), bytes_);
  }

  const Kernels& kernels_;
  const Dtype dtype_;
  const int64_t bytes_;
  const ScalarType type_;
  const Rows rows_;
  const Int8Product up_;
  const std::optional<Int8Product> gate_;
  const Int8Product down_;
  const Activation activation_;
  const Hidden hidden_;
  const RowNorm before_, after_;
  const ActivationScheme scheme_;
  std::optional<Rows> residual_;
  Tensor y_;
  char* out_;
};

}  // namespace

Tensor feed_forward(const Tensor& x, const Tensor& packed_up, const Tensor& weight_scale_up,
                    const std::optional<Tensor>& bias_up, const std::optional<Tensor>& packed_gate,
                    const std::optional<Tensor>& weight_scale_gate,
                    const std::optional<Tensor>& bias_gate, const Tensor& packed_down,
                    const Tensor& weight_scale_down, const std::optional<Tensor>& bias_down,
                    int64_t activation, int64_t split, const std::optional<Tensor>& residual,
                    int64_t norm_before, const std::optional<Tensor>& norm_before_weight,
                    const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
                    int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
                    const std::optional<Tensor>& norm_after_bias, double norm_after_eps,
                    bool per_token, bool symmetric, int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  Int8Product up(packed_up, weight_scale_up, bias_up, kUp);
  Int8Product down(packed_down, weight_scale_down, bias_down, kDown);
  RowNorm before(norm_before, norm_before_weight, norm_before_bias, norm_before_eps, up.k(),
                 kNormBefore);
  RowNorm after(norm_after, norm_after_weight, norm_after_bias, norm_after_eps, down.n(),
                kNormAfter);
  return FeedForward(x, std::move(up),
                     optional_product(packed_gate, weight_scale_gate, bias_gate, kGate),
                     std::move(down), activation, split, residual, std::move(before),
                     std::move(after), scheme)
      .run();
}

}  // namespace dynquant
