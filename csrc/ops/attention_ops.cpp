// rotary, scaled_dot_product and attention.
#include "attention_core.h"
#include "ops.h"

namespace dynquant {
namespace {

constexpr ColumnNames kQuery = {"packed_q", "weight_scale_q", "bias_q"};
constexpr ColumnNames kKey = {"packed_k", "weight_scale_k", "bias_k"};
constexpr ColumnNames kValue = {"packed_v", "weight_scale_v", "bias_v"};
constexpr ColumnNames kOut = {"packed_out", "weight_scale_out", "bias_out"};

// x[B, rows, heads, D] as it lies in memory, copied where the values of a head do not lie together.
struct HeadsOf {
  Tensor holder;
  Heads heads;

  HeadsOf(const Tensor& x, const char* name) : holder(x) {
    check(x.dim() == 4, name, " must have four dimensions [B, rows, heads, D], got ", ShapeOf(x));
    if (x.size(3) > 1 && x.stride(3) != 1) holder = torch::stable::contiguous(x);
    const int64_t bytes = static_cast<int64_t>(x.element_size());
    heads = {static_cast<char*>(const_cast<void*>(holder.const_data_ptr())),
             holder.stride(0) * bytes, holder.stride(1) * bytes, holder.stride(2) * bytes};
  }
};

Heads heads_at(char* data, int64_t batch_bytes, int64_t row_bytes, int64_t head_bytes) {
  return {data, batch_bytes, row_bytes, head_bytes};
}

// The angles of a rotary embedding: cos and sin [B, L, R] or [L, R], in fp32.
class Angles {
 public:
  Angles(const Tensor& cos, const Tensor& sin, int64_t batch, int64_t rows, int64_t dim)
      : cos_(dense(cos, "cos", batch, rows, dim)), sin_(dense(sin, "sin", batch, rows, dim)) {
    check(cos.dim() == sin.dim() && cos.size(-1) == sin.size(-1) && cos.size(0) == sin.size(0),
          "cos and sin must have one shape, got ", ShapeOf(cos), " and ", ShapeOf(sin));
    dim_ = cos_.size(cos_.dim() - 1);
    rows_ = rows;
    const bool each = cos_.dim() == 3 && cos_.size(0) > 1;
    batch_stride_ = each ? rows * dim_ : 0;
    cos_data_ = static_cast<const float*>(cos_.const_data_ptr());
    sin_data_ = static_cast<const float*>(sin_.const_data_ptr());
  }

  int64_t dim() const { return dim_; }

  // Turns the first values of a head; y may be x.
  void turn(const Kernels& kernels, Dtype dtype, int64_t b, int64_t row, const void* x,
            void* y) const {
    const int64_t at = b * batch_stride_ + row * dim_;
    kernels.rotary({dtype, x, dim_, cos_data_ + at, sin_data_ + at, y});
  }

 private:
  static Tensor dense(const Tensor& t, const char* name, int64_t batch, int64_t rows, int64_t dim) {
    check_float(t, name);
    const bool fits = t.dim() == 2 || (t.dim() == 3 && (t.size(0) == batch || t.size(0) == 1));
    check(fits && t.size(t.dim() - 2) == rows, name, " must have the shape [", rows, ", R] or [",
          batch, ", ", rows, ", R], got ", ShapeOf(t));
    const int64_t turned = t.size(t.dim() - 1);
    check(turned > 0 && turned % 2 == 0 && turned <= dim, name,
          " must turn an even number of values of a head of ", dim, ", got ", ShapeOf(t));
    const Tensor widened =
        t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
    return dynquant::dense(widened);
  }

  Tensor cos_, sin_;
  const float *cos_data_, *sin_data_;
  int64_t dim_, rows_, batch_stride_;
};

void check_kv_heads(int64_t heads, int64_t kv_heads) {
  check(kv_heads > 0 && heads % kv_heads == 0,
        "the heads of the query must be a multiple of those of key and value, got ", heads, " and ",
        kv_heads);
}

void check_keys(int64_t keys, bool integers) {
  check(!integers || keys <= kMaxK, "key has ", keys, " rows, more than ", kMaxK,
        ", beyond which int32 sums may overflow; integers=False takes them");
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const Dtype dtype = check_float(x, "x");
  const HeadsOf in(x, "x");
  const int64_t batch = x.size(0), rows = x.size(1), count = x.size(2), dim = x.size(3);
  const Angles angles(cos, sin, batch, rows, dim);
  const Kernels& kernels = kernels_in_use();
  Tensor y = empty({batch, rows, count, dim}, x.scalar_type());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(y.element_size());
  run_rows(batch * rows, count * dim * 4, [&](int64_t m) {
    for (int64_t h = 0; h < count; ++h) {
      const char* from = in.heads.at(m / rows, m % rows, h);
      char* to = out + (m * count + h) * dim * bytes;
      std::copy(from, from + dim * bytes, to);
      angles.turn(kernels, dtype, m / rows, m % rows, to, to);
    }
  });
  return y;
}

Tensor scaled_dot_product(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& position_bias, bool is_causal,
                          std::optional<double> scale, bool integers) {
  const Dtype dtype = check_float(query, "query");
  check_tensor(key, "key", {query.scalar_type()});
  check_tensor(value, "value", {query.scalar_type()});
  const HeadsOf q(query, "query"), k(key, "key"), v(value, "value");
  const AttentionShape shape = {query.size(0), query.size(1), key.size(1),
                                query.size(2), key.size(2),   query.size(3)};
  check(shape.dim > 0, "query must have D > 0, got ", ShapeOf(query));
  check(key.size(0) == shape.batch && key.size(3) == shape.dim, "key must have the shape [",
        shape.batch, ", S, KV, ", shape.dim, "], like query, got ", ShapeOf(key));
  for (int64_t d = 0; d < 4; ++d) {
    check(value.size(d) == key.size(d), "value must have the shape of key, got ", ShapeOf(value));
  }
  check(shape.keys > 0, "key must have a row at least, got ", ShapeOf(key));
  check_kv_heads(shape.heads, shape.kv_heads);
  check_keys(shape.keys, integers);
  const AttentionCore core(kernels_in_use(), dtype, shape, mask, position_bias, is_causal, scale,
                           integers);
  Tensor out = empty({shape.batch, shape.rows, shape.heads, shape.dim}, query.scalar_type());
  const int64_t head = shape.dim * static_cast<int64_t>(out.element_size());
  core.attend_all(q.heads, k.heads, v.heads,
                  heads_at(static_cast<char*>(out.mutable_data_ptr()),
                           shape.rows * shape.heads * head, shape.heads * head, head));
  return out;
}

namespace {

// Self attention from x to the output projection, residual and norm. Query, key and value of a row
// lie one after the other in a buffer: `width` values.
class SelfAttention {
 public:
  SelfAttention(BlockRows rows, const Tensor& x, Int8Product query, std::optional<Int8Product> key,
                std::optional<Int8Product> value, Int8Product out, int64_t heads, int64_t kv_heads,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias,
                bool is_causal, std::optional<double> scale, const std::optional<Tensor>& cos,
                const std::optional<Tensor>& sin, bool integers)
      : rows_(std::move(rows)),
        query_(std::move(query)),
        key_(std::move(key)),
        value_(std::move(value)),
        output_(std::move(out)),
        shape_(shape_of(x, heads, kv_heads)),
        width_((shape_.heads + 2 * shape_.kv_heads) * shape_.dim),
        core_(rows_.kernels, rows_.dtype, shape_, mask, position_bias, is_causal, scale, integers) {
    check_keys(shape_.keys, integers);
    check(cos.has_value() == sin.has_value(), "cos and sin must both be given or neither");
    if (cos.has_value()) angles_.emplace(*cos, *sin, shape_.batch, shape_.rows, shape_.dim);
  }

  Tensor run() {
    const Tensor y = rows_.make_output();
    if (rows_.in.m == 0 || output_.n() == 0) return y;
    const Product& product = product_for(rows_.kernels, rows_.in.m);
    const int64_t threads = num_threads();
    // Whole sequences for each thread, where there are enough and they are alike in work.
    if (rows_.scheme.per_token &&
        (threads == 1 || shape_.batch % threads == 0 || shape_.batch >= kManySequences * threads)) {
      run_sequences(product, threads);
    } else {
      const double products = product_nanoseconds(rows_.in.m, width_ + output_.n(), query_.k(),
                                                  product.costs, product.row_multiple);
      with_team(products, [&] { run_phases(); });
    }
    return y;
  }

 private:
  static constexpr int64_t kManySequences = 8;
  static constexpr int64_t kSequenceRows = 192;

  AttentionShape shape_of(const Tensor& x, int64_t heads, int64_t kv_heads) const {
    check(heads > 0 && heads <= kMaxK, "heads must lie in [1, ", kMaxK, "], got ", heads);
    check(kv_heads > 0 && heads % kv_heads == 0,
          "kv_heads must be positive and divide heads = ", heads, ", got ", kv_heads);
    check(key_.has_value() == value_.has_value(),
          "packed_k and packed_v must both be given or neither");
    const int64_t parts = key_.has_value() ? heads : heads + 2 * kv_heads;
    check(query_.n() > 0 && query_.n() % parts == 0, "packed_q must have N, a multiple of ", parts,
          ", got ", query_.n());
    const int64_t dim = query_.n() / parts;
    for (const std::optional<Int8Product>* part : {&key_, &value_}) {
      if (!part->has_value()) continue;
      check((*part)->n() == kv_heads * dim && (*part)->k() == query_.k(), (*part)->name,
            " must have the shape [", kv_heads * dim, ", ", query_.k(), "], got [", (*part)->n(),
            ", ", (*part)->k(), "]");
    }
    check(output_.k() == heads * dim, "packed_out must have K = ", heads * dim, ", got ",
          output_.k());
    return {x.size(0), x.size(1), x.size(1), heads, kv_heads, dim};
  }

  // Where key and value begin in a row, in values.
  int64_t key_at() const { return shape_.heads * shape_.dim; }
  int64_t value_at() const { return key_at() + shape_.kv_heads * shape_.dim; }

  // f(product, the first column that it gives, what is multiplied next) for each of the products of
  // x.
  template <class F>
  void each_product(const F& f) const {
    f(query_, 0, key_.has_value() ? *key_ : output_);
    if (!key_.has_value()) return;
    f(*key_, key_at(), *value_);
    f(*value_, value_at(), output_);
  }

  Heads heads_in(char* buffer, int64_t first, int64_t width) const {
    const int64_t row = width * rows_.bytes;
    return {buffer + first * rows_.bytes, shape_.rows * row, row, shape_.dim * rows_.bytes};
  }

  // Turns query and key of one row; m counts the rows of x.
  void turn(char* row, int64_t m) const {
    if (!angles_.has_value()) return;
    for (int64_t h = 0; h < shape_.heads + shape_.kv_heads; ++h) {
      char* head = row + h * shape_.dim * rows_.bytes;
      angles_->turn(rows_.kernels, rows_.dtype, m / shape_.rows, m % shape_.rows, head, head);
    }
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
    const int64_t context = key_at(), bytes = rows_.bytes;
    const Dtype dtype = rows_.dtype;
    Pieces pieces(Purpose::block, {m * width_ * bytes, m * context * bytes, rows_.normed_bytes(m)});
    char* buffer = pieces.next(m * width_ * bytes);
    char* contexts = pieces.next(m * context * bytes);
    const Rows in = rows_.begin(first, m, pieces.next(rows_.normed_bytes(m)));
    for_each_block(m, in.k, product.row_multiple, [&](int64_t from, int64_t to) {
      const StagedBlock staged(product, rows_.source(in), in.k, from, to - from,
                               Purpose::staged_rows);
      each_product([&](const Int8Product& by, int64_t column, const Int8Product& next) {
        staged.multiply(by.weight, by.to(buffer + (from * width_ + column) * bytes, width_, dtype),
                        next.weight.panels);
      });
    });
    for (int64_t r = 0; r < m; ++r) turn(buffer + r * width_ * bytes, first + r);
    // Heads of the block's first sequence on, numbered as in the whole batch: masks want that.
    const int64_t behind = begin * l;
    const Heads query = heads_in(buffer - behind * width_ * bytes, 0, width_);
    const Heads key = heads_in(buffer - behind * width_ * bytes, key_at(), width_);
    const Heads value = heads_in(buffer - behind * width_ * bytes, value_at(), width_);
    const Heads out = heads_in(contexts - behind * context * bytes, 0, context);
    Fetch fetch(output_.weight, m, m * shape_.heads);
    for (int64_t b = begin; b < end; ++b) {
      core_.attend(query, key, value, out, b, 0, shape_.kv_heads, 0, l, fetch);
    }
    const Rows attended = rows_at(contexts, m, context, context * bytes);
    for_each_block(m, context, product.row_multiple, [&](int64_t from, int64_t to) {
      const StagedBlock staged(product, rows_.source(attended), context, from, to - from,
                               Purpose::staged_rows);
      staged.multiply(output_.weight, output_.to(rows_.out(first + from), output_.n(), dtype));
    });
    rows_.finish(first, first + m);
  }

  // One step after the other, each on all threads.
  void run_phases() const {
    const int64_t m = rows_.in.m, context = key_at(), bytes = rows_.bytes;
    const Dtype dtype = rows_.dtype;
    const Rows in = rows_.begin_all();
    Tensor holder = empty({m, width_}, rows_.type),
           context_holder = empty({m, context}, rows_.type);
    char* buffer = static_cast<char*>(holder.mutable_data_ptr());
    char* contexts = static_cast<char*>(context_holder.mutable_data_ptr());
    std::vector<Target> targets;
    each_product([&](const Int8Product& by, int64_t column, const Int8Product&) {
      targets.push_back({by.weight, by.to(buffer + column * bytes, width_, dtype)});
    });
    multiply(rows_.kernels, rows_.source(in), m, targets.data(),
             static_cast<int64_t>(targets.size()), bytes);
    if (angles_.has_value()) {
      run_rows(m, width_ * 4, [&](int64_t r) { turn(buffer + r * width_ * bytes, r); });
    }
    core_.attend_all(heads_in(buffer, 0, width_), heads_in(buffer, key_at(), width_),
                     heads_in(buffer, value_at(), width_), heads_in(contexts, 0, context));
    const Rows attended = rows_at(contexts, m, context, context * bytes);
    multiply(rows_.kernels, rows_.source(attended), m, output_.weight,
             output_.to(rows_.out(0), output_.n(), dtype), bytes);
    rows_.finish_all();
  }

  BlockRows rows_;
  const Int8Product query_;
  const std::optional<Int8Product> key_, value_;
  const Int8Product output_;
  const AttentionShape shape_;
  const int64_t width_;
  const AttentionCore core_;
  std::optional<Angles> angles_;
};

}  // namespace

Tensor attention(const Tensor& x, const Tensor& packed_q, const Tensor& weight_scale_q,
                 const std::optional<Tensor>& bias_q, const std::optional<Tensor>& packed_k,
                 const std::optional<Tensor>& weight_scale_k, const std::optional<Tensor>& bias_k,
                 const std::optional<Tensor>& packed_v, const std::optional<Tensor>& weight_scale_v,
                 const std::optional<Tensor>& bias_v, const Tensor& packed_out,
                 const Tensor& weight_scale_out, const std::optional<Tensor>& bias_out,
                 int64_t heads, int64_t kv_heads, const std::optional<Tensor>& mask,
                 const std::optional<Tensor>& position_bias, bool is_causal,
                 std::optional<double> scale, const std::optional<Tensor>& cos,
                 const std::optional<Tensor>& sin, bool integers,
                 const std::optional<Tensor>& residual, int64_t norm_before,
                 const std::optional<Tensor>& norm_before_weight,
                 const std::optional<Tensor>& norm_before_bias, double norm_before_eps,
                 int64_t norm_after, const std::optional<Tensor>& norm_after_weight,
                 const std::optional<Tensor>& norm_after_bias, double norm_after_eps,
                 bool per_token, bool symmetric, int64_t activation_bits) {
  Int8Product query(packed_q, weight_scale_q, bias_q, kQuery);
  Int8Product out(packed_out, weight_scale_out, bias_out, kOut);
  BlockEnds ends(query.k(), out.n(), residual, norm_before, norm_before_weight, norm_before_bias,
                 norm_before_eps, norm_after, norm_after_weight, norm_after_bias, norm_after_eps,
                 per_token, symmetric, activation_bits);
  check(x.dim() == 3, "x must have three dimensions [B, L, K], got ", ShapeOf(x));
  BlockRows rows(x, query, out.n(), std::move(ends));
  return SelfAttention(std::move(rows), x, std::move(query),
                       optional_product(packed_k, weight_scale_k, bias_k, kKey),
                       optional_product(packed_v, weight_scale_v, bias_v, kValue), std::move(out),
                       heads, kv_heads, mask, position_bias, is_causal, scale, cos, sin, integers)
      .run();
}

}  // namespace dynquant
