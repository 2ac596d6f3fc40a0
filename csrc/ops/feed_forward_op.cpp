// feed_forward: norm, up and gate products, activation, down product, residual, norm, in blocks of
// rows that stay in the L2 cache.
#include "block.h"
#include "fetch.h"
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
  FeedForward(BlockRows rows, Int8Product up, std::optional<Int8Product> gate, Int8Product down,
              int64_t activation, int64_t split)
      : rows_(std::move(rows)),
        up_(std::move(up)),
        gate_(std::move(gate)),
        down_(std::move(down)),
        activation_(check_activation(activation, "activation")),
        hidden_(hidden_of(split)) {
    if (gate_.has_value()) {
      check(gate_->k() == up_.k(), gate_->name, " must have K = ", up_.k(), ", like ", up_.name,
            ", got ", gate_->k());
    }
  }

  Tensor run() {
    return rows_.run(
        size_of(up_, {pointer_to(gate_), &down_}), [&] { run_phases(); },
        [&](const Product& product, int64_t parts) { run_blocks(product, parts); });
  }

 private:
  static constexpr int64_t kPiece = 256;  // values of a row that are activated in one step

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

  // The activation of one row of the hidden layer, in place, in pieces between which the next
  // weight is fetched.
  void activate(char* row, Fetch& fetch) const {
    char* x = row + hidden_.activated * rows_.bytes;
    const char* by = hidden_.by < 0 ? nullptr : row + hidden_.by * rows_.bytes;
    for (int64_t done = 0, count; done < down_.k(); done += count) {
      const int64_t at = done * rows_.bytes, left = down_.k() - done;
      count = fetch.is_over() ? left : std::min(kPiece, left);
      const char* by_piece = by == nullptr ? nullptr : by + at;
      rows_.kernels.activate({activation_, rows_.dtype, x + at, by_piece, count, x + at});
      fetch.some();
    }
  }

  Rows activated_rows(char* hidden, int64_t m) const {
    return rows_at(hidden + hidden_.activated * rows_.bytes, m, down_.k(), hidden_row_bytes());
  }

  // Where `up` writes: beside the gate's values, or over the whole row where it has both.
  char* up_out(char* hidden) const {
    return gate_.has_value() ? hidden + hidden_.by * rows_.bytes : hidden;
  }

  // Rows of the hidden layer, each activated as it is staged: it is in the L1 cache then.
  struct ActivatedRows {
    const FeedForward& block;
    char* hidden;
    FloatRows rows;
    Fetch& fetch;

    int64_t bytes() const { return rows.bytes(); }
    StagedRow stage(const Product& product, int64_t m, uint8_t* staged, uint8_t* low) const {
      block.activate(hidden + m * block.hidden_row_bytes(), fetch);
      return rows.stage(product, m, staged, low);
    }
  };

  int64_t hidden_row_bytes() const { return hidden_.width * rows_.bytes; }

  // Every task takes rows of its own from the beginning to the end.
  void run_blocks(const Product& product, int64_t parts) const {
    const int64_t staged = std::max(staged_stride(product.layout, groups_of(up_.k())),
                                    staged_stride(product.layout, groups_of(down_.k())));
    const int64_t row_bytes = rows_.normed_bytes(1) + staged * (rows_.scheme.bits / 8) +
                              hidden_row_bytes() + (up_.k() + down_.n()) * rows_.bytes;
    run_row_blocks(product, rows_.in.m, parts, row_bytes,
                   [&](int64_t begin, int64_t end) { run_block(product, begin, end); });
  }

  void run_block(const Product& product, int64_t begin, int64_t end) const {
    const int64_t m = end - begin, hidden_bytes = m * hidden_row_bytes();
    Pieces pieces(Purpose::block, {hidden_bytes, rows_.normed_bytes(m)});
    char* hidden = pieces.next(hidden_bytes);
    const Rows in = rows_.begin(begin, m, pieces.next(rows_.normed_bytes(m)));
    {
      const StagedBlock staged(product, rows_.source(in), in.k, 0, m, Purpose::staged_rows);
      const int8_t* last = down_.weight.panels;
      staged.multiply(up_.weight, up_.to(up_out(hidden), hidden_.width, rows_.dtype),
                      gate_.has_value() ? gate_->weight.panels : last);
      if (gate_.has_value()) {
        staged.multiply(gate_->weight, gate_->to(hidden, hidden_.width, rows_.dtype), last);
      }
    }
    Fetch fetch(down_.weight, m, m * ceil_div(down_.k(), kPiece));
    const ActivatedRows activated = {*this, hidden, rows_.source(activated_rows(hidden, m)), fetch};
    const StagedBlock staged(product, activated, down_.k(), 0, m, Purpose::staged_rows);
    staged.multiply(down_.weight, down_.to(rows_.out(begin), down_.n(), rows_.dtype));
    rows_.finish(begin, end);
  }

  // One step after the other, each on all threads.
  void run_phases() const {
    const int64_t m = rows_.in.m;
    const Rows in = rows_.begin_all();
    Tensor holder = empty({m, hidden_.width}, rows_.type);
    char* hidden = static_cast<char*>(holder.mutable_data_ptr());
    const Int8Product& gate = gate_.has_value() ? *gate_ : up_;
    const Target ups[] = {{up_.weight, up_.to(up_out(hidden), hidden_.width, rows_.dtype)},
                          {gate.weight, gate.to(hidden, hidden_.width, rows_.dtype)}};
    multiply(rows_.kernels, rows_.source(in), m, ups, gate_.has_value() ? 2 : 1, rows_.bytes);
    run_rows(m, down_.k() * 16, [&](int64_t r) {
      Fetch nothing;
      activate(hidden + r * hidden_row_bytes(), nothing);
    });
    multiply(rows_.kernels, rows_.source(activated_rows(hidden, m)), m, down_.weight,
             down_.to(rows_.out(0), down_.n(), rows_.dtype), rows_.bytes);
    rows_.finish_all();
  }

  BlockRows rows_;
  const Int8Product up_;
  const std::optional<Int8Product> gate_;
  const Int8Product down_;
  const Activation activation_;
  const Hidden hidden_;
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
                    bool per_token, bool symmetric, int64_t activation_bits, bool residual_last) {
  Int8Product up(packed_up, weight_scale_up, bias_up, kUp);
  Int8Product down(packed_down, weight_scale_down, bias_down, kDown);
  BlockEnds ends(up.k(), down.n(), residual, norm_before, norm_before_weight, norm_before_bias,
                 norm_before_eps, norm_after, norm_after_weight, norm_after_bias, norm_after_eps,
                 per_token, symmetric, activation_bits, residual_last);
  BlockRows rows(x, up, down.n(), std::move(ends));
  return FeedForward(std::move(rows), std::move(up),
                     optional_product(packed_gate, weight_scale_gate, bias_gate, kGate),
                     std::move(down), activation, split)
      .run();
}

}  // namespace dynquant
