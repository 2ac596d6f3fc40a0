// attention: self attention from x to the output projection, residual and norm.
#include "query_key_value.h"

namespace dynquant {
namespace {

class SelfAttention {
 public:
  SelfAttention(BlockRows rows, QueryKeyValue inputs, Int8Product out,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias,
                bool is_causal, std::optional<double> scale, bool integers)
      : rows_(std::move(rows)),
        inputs_(std::move(inputs)),
        output_(std::move(out)),
        shape_(inputs_.shape()),
        core_(rows_.kernels, rows_.dtype, rows_.dtype, shape_, mask, position_bias, is_causal,
              scale, integers) {
    check(output_.k() == inputs_.key_at(), "packed_out must have K = ", inputs_.key_at(), ", got ",
          output_.k());
  }

  Tensor run() {
    const Tensor y = rows_.make_output();
    if (rows_.in.m == 0 || output_.n() == 0) return y;
    const ProductSize size = inputs_.size_with(&output_);
    const Product& product = product_for(rows_.kernels, rows_.in.m, size.n, size.k);
    const int64_t threads = num_threads();
    // Whole sequences for each thread, where there are enough and they are alike in work.
    if (rows_.scheme.per_token &&
        (threads == 1 || shape_.batch % threads == 0 || shape_.batch >= kManySequences * threads)) {
      run_sequences(product, threads);
    } else {
      with_team(rows_.nanoseconds(product, size), [&] { run_phases(); });
    }
    return y;
  }

 private:
  static constexpr int64_t kManySequences = 8;
  static constexpr int64_t kSequenceRows = 192;

  Heads heads_in(char* buffer, int64_t first, int64_t width) const {
    const int64_t row = width * rows_.bytes;
    return {buffer + first * rows_.bytes, shape_.rows * row, row, shape_.dim * rows_.bytes};
  }

  // Query, key and value in `buffer`, beside each other in each row.
  AttentionHeads heads_of(char* buffer, char* contexts) const {
    const int64_t width = inputs_.width();
    return {heads_in(buffer, 0, width), heads_in(buffer, inputs_.key_at(), width),
            heads_in(buffer, inputs_.value_at(), width), heads_in(contexts, 0, inputs_.key_at())};
  }

  // Every task takes sequences of its own, several where they are short.
  void run_sequences(const Product& product, int64_t threads) const {
    const int64_t most = std::max<int64_t>(1, kSequenceRows / shape_.rows);
    const int64_t parts = std::min(threads, shape_.batch);
    run_tasks(parts, [&](int64_t part) {
      const int64_t first = shape_.batch * part / parts, last = shape_.batch * (part + 1) / parts;
      const int64_t blocks = ceil_div(last - first, most);
      for (int64_t i = 0; i < blocks; ++i) {
        run_block(product, first + (last - first) * i / blocks,
                  first + (last - first) * (i + 1) / blocks);
      }
    });
  }

  // The sequences [begin, end).
  void run_block(const Product& product, int64_t begin, int64_t end) const {
    const int64_t l = shape_.rows, m = (end - begin) * l, first = begin * l;
    const int64_t context = inputs_.key_at(), width = inputs_.width(), bytes = rows_.bytes;
    const Dtype dtype = rows_.dtype;
    Pieces pieces(Purpose::block, {m * width * bytes, m * context * bytes, rows_.normed_bytes(m)});
    char* buffer = pieces.next(m * width * bytes);
    char* contexts = pieces.next(m * context * bytes);
    const Rows in = rows_.begin(first, m, pieces.next(rows_.normed_bytes(m)));
    inputs_.multiply_block(product, rows_, in, buffer, &output_);
    for (int64_t r = 0; r < m; ++r) inputs_.turn(rows_, buffer + r * width * bytes, first + r);
    // Heads of the block's first sequence on, numbered as in the whole batch: masks want that.
    const int64_t behind = begin * l;
    const AttentionHeads heads =
        heads_of(buffer - behind * width * bytes, contexts - behind * context * bytes);
    Fetch fetch(output_.weight, m, m * shape_.heads);
    for (int64_t b = begin; b < end; ++b) {
      core_.attend(heads, b, 0, shape_.kv_heads, 0, l, fetch);
    }
    const Rows attended = rows_at(contexts, m, context, context * bytes);
    for_each_block(product, m, context, product.row_multiple, [&](int64_t from, int64_t to) {
      const StagedBlock staged(product, rows_.source(attended), context, from, to - from,
                               Purpose::staged_rows);
      staged.multiply(output_.weight, output_.to(rows_.out(first + from), output_.n(), dtype));
    });
    rows_.finish(first, first + m);
  }

  // One step after the other, each on all threads.
  void run_phases() const {
    const int64_t m = rows_.in.m, context = inputs_.key_at(), width = inputs_.width();
    const int64_t bytes = rows_.bytes;
    const Rows in = rows_.begin_all();
    Tensor holder = empty({m, width}, rows_.type), context_holder = empty({m, context}, rows_.type);
    char* buffer = static_cast<char*>(holder.mutable_data_ptr());
    char* contexts = static_cast<char*>(context_holder.mutable_data_ptr());
    inputs_.multiply_all(rows_, in, buffer);
    if (inputs_.turns()) {
      run_rows(m, width * 4,
               [&](int64_t r) { inputs_.turn(rows_, buffer + r * width * bytes, r); });
    }
    core_.attend_all(heads_of(buffer, contexts));
    const Rows attended = rows_at(contexts, m, context, context * bytes);
    multiply(rows_.kernels, rows_.source(attended), m, output_.weight,
             output_.to(rows_.out(0), output_.n(), rows_.dtype), bytes);
    rows_.finish_all();
  }

  BlockRows rows_;
  const QueryKeyValue inputs_;
  const Int8Product output_;
  const AttentionShape shape_;
  const AttentionCore core_;
};

}  // namespace

Tensor attention(
    const Tensor& x, const Tensor& packed_q, const Tensor& weight_scale_q,
    const std::optional<Tensor>& bias_q, const std::optional<Tensor>& packed_k,
    const std::optional<Tensor>& weight_scale_k, const std::optional<Tensor>& bias_k,
    const std::optional<Tensor>& packed_v, const std::optional<Tensor>& weight_scale_v,
    const std::optional<Tensor>& bias_v, const Tensor& packed_out, const Tensor& weight_scale_out,
    const std::optional<Tensor>& bias_out, int64_t heads, int64_t kv_heads,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias, bool is_causal,
    std::optional<double> scale, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    bool integers, const std::optional<Tensor>& residual, int64_t norm_before,
    const std::optional<Tensor>& norm_before_weight, const std::optional<Tensor>& norm_before_bias,
    double norm_before_eps, int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
    const std::optional<Tensor>& norm_after_bias, double norm_after_eps, bool per_token,
    bool symmetric, int64_t activation_bits, bool residual_last, bool interleaved) {
  check_sequences(x);
  Int8Product query(packed_q, weight_scale_q, bias_q, kQuery);
  Int8Product out(packed_out, weight_scale_out, bias_out, kOut);
  BlockEnds ends(query.k(), out.n(), residual, norm_before, norm_before_weight, norm_before_bias,
                 norm_before_eps, norm_after, norm_after_weight, norm_after_bias, norm_after_eps,
                 per_token, symmetric, activation_bits, residual_last);
  BlockRows rows(x, query, out.n(), std::move(ends));
  QueryKeyValue inputs(x, std::move(query),
                       optional_product(packed_k, weight_scale_k, bias_k, kKey),
                       optional_product(packed_v, weight_scale_v, bias_v, kValue), heads, kv_heads,
                       cos, sin, interleaved);
  return SelfAttention(std::move(rows), std::move(inputs), std::move(out), mask, position_bias,
                       is_causal, scale, integers)
      .run();
}

}  // namespace dynquant
