// gated_delta_rule: linear attention whose state forgets, and learns what it does not know yet.
#include <algorithm>
#include <cmath>
#include <limits>

#include "heads.h"
#include "parallel.h"
#include "pieces.h"

namespace dynquant {
namespace {

constexpr double kLeastSquares = 1e-6;   // added to the sum of squares of a vector
constexpr int64_t kTokensTogether = 32;  // whose queries and keys wait in the L1 or L2 cache

// Queries and keys of some tokens of one head in fp32, of length 1 where that is asked for.
class Vectors {
 public:
  Vectors(const Kernels& kernels, int64_t dim, bool normalize)
      : kernels_(kernels), dim_(dim), normalize_(normalize) {
    // x / sqrt(sum of squares + e) = x / sqrt(mean of squares + e / dim) * dim^-0.5.
    const double size = static_cast<double>(dim);
    weight_.assign(static_cast<size_t>(normalize ? dim : 0),
                   static_cast<float>(1.0 / std::sqrt(size)));
    eps_ = static_cast<float>(kLeastSquares / size);
  }

  void take(const HeadsOf& x, int64_t batch, int64_t head, int64_t first, int64_t count,
            float* to) const {
    for (int64_t t = 0; t < count; ++t) {
      kernels_.widen(x.heads.at(batch, first + t, head), x.dtype, dim_, to + t * dim_);
    }
    if (!normalize_) return;
    NormArgs a = {};
    a.norm = Norm::rms, a.dtype = Dtype::f32, a.n = dim_, a.weight = weight_.data(), a.eps = eps_;
    a.x = to, a.y = to, a.rows = count;
    a.x_stride = a.y_stride = dim_ * static_cast<int64_t>(sizeof(float));
    kernels_.norm(a);
  }

 private:
  const Kernels& kernels_;
  const int64_t dim_;
  const bool normalize_;
  std::vector<float> weight_;
  float eps_;
};

class GatedDeltaRule {
 public:
  GatedDeltaRule(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& decay,
                 const Tensor& beta, const std::optional<Tensor>& state,
                 std::optional<double> scale, bool normalize)
      : kernels_(kernels_in_use()),
        query_(query, "query"),
        key_(key, "key"),
        value_(value, "value"),
        vectors_(kernels_, key_.dim, normalize) {
    check_same_shape(key, "key", query, "query");
    check_tensor(key, "key", {query.scalar_type()});
    check_tensor(value, "value", {query.scalar_type()});
    check(value_.batch == key_.batch && value_.rows == key_.rows, "value must have the shape [",
          key_.batch, ", ", key_.rows, ", HV, DV], got ", ShapeOf(value));
    check(key_.count > 0 && value_.count % key_.count == 0,
          "the heads of value must be a multiple of those of key, got ", value_.count, " and ",
          key_.count);
    check(key_.dim > 0, "key must have D > 0, got ", ShapeOf(key));
    decay_ = FloatBias(decay, {value_.batch, value_.rows, value_.count}, "decay");
    beta_ = FloatBias(beta, {value_.batch, value_.rows, value_.count}, "beta");
    if (state.has_value()) {
      check_tensor(*state, "state", {ScalarType::Float});
      check_shape(*state, "state, as value and key have it,",
                  {value_.batch, value_.count, key_.dim, value_.dim});
      before_ = dense(*state);
    }
    constexpr double kMost = std::numeric_limits<float>::max();
    check(!scale.has_value() || std::abs(*scale) <= kMost, "scale must be finite in fp32, got ",
          scale.value_or(0.0));
    scale_ = static_cast<float>(scale.has_value() ? *scale
                                                  : 1.0 / std::sqrt(static_cast<double>(key_.dim)));
  }

  Tensor empty_state() const {
    return empty({value_.batch, value_.count, key_.dim, value_.dim}, ScalarType::Float);
  }

  // What comes out; the state becomes `after`, a dense tensor, which may be the one before.
  Tensor run(const Tensor& after) {
    const int64_t batch = value_.batch, rows = value_.rows, heads = value_.count;
    Tensor y = empty({batch, rows, heads, value_.dim}, value_.holder.scalar_type());
    out_ = static_cast<char*>(y.mutable_data_ptr());
    after_ = static_cast<float*>(after.mutable_data_ptr());
    // Parts of a head's columns, where the heads alone are fewer than the threads that are worth
    // it.
    constexpr int64_t kCost = 4;  // of one value of the state and one token
    const int64_t pieces = ceil_div(value_.dim, kDeltaColumns), all = batch * heads;
    const int64_t cost = key_.dim * kDeltaColumns * (rows + 1) * kCost;
    const int64_t worth = parts_worth(Threads::kPool, all * pieces, cost);
    const int64_t parts = all * pieces == 0 ? 0 : std::min(pieces, ceil_div(worth, all));
    run_range(all * parts, parts == 0 ? 0 : cost * pieces / parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts;
        run_columns(i / parts, pieces * part / parts * kDeltaColumns,
                    std::min(pieces * (part + 1) / parts * kDeltaColumns, value_.dim));
      }
    });
    return y;
  }

 private:
  // Columns [begin, end) of a head of a sequence.
  void run_columns(int64_t at, int64_t begin, int64_t end) const {
    const int64_t dim = key_.dim, columns = value_.dim, count = end - begin;
    const int64_t tokens = std::min(kTokensTogether, value_.rows);
    constexpr int64_t kBytes = sizeof(float);
    Pieces pieces(Purpose::block, {tokens * dim * kBytes, tokens * dim * kBytes,
                                   tokens * count * kBytes, tokens * count * kBytes,
                                   tokens * kBytes, tokens * kBytes, dim * kDeltaColumns * kBytes});
    float* queries = pieces.next<float>(tokens * dim);
    float* keys = pieces.next<float>(tokens * dim);
    float* values = pieces.next<float>(tokens * count);
    float* outs = pieces.next<float>(tokens * count);
    float* decays = pieces.next<float>(tokens);
    float* betas = pieces.next<float>(tokens);
    float* columns_of_state = pieces.next<float>(dim * kDeltaColumns);

    const int64_t batch = at / value_.count, head = at % value_.count;
    const int64_t key_head = head / (value_.count / key_.count);
    float* state = after_ + at * dim * columns + begin;
    const float* from = state;
    if (before_.has_value()) {
      from = static_cast<const float*>(before_->const_data_ptr()) + at * dim * columns + begin;
    } else {
      for (int64_t i = 0; i < dim; ++i) std::fill_n(state + i * columns, count, 0.0f);
    }
    if (value_.rows == 0 && from != state) copy_rows(from, columns, dim, count, state, columns);

    for (int64_t first = 0; first < value_.rows; first += tokens) {
      const int64_t some = std::min(tokens, value_.rows - first);
      vectors_.take(query_, batch, key_head, first, some, queries);
      vectors_.take(key_, batch, key_head, first, some, keys);
      for (int64_t t = 0; t < some; ++t) {
        const char* value =
            value_.heads.at(batch, first + t, head) + begin * bytes_of(value_.dtype);
        kernels_.widen(value, value_.dtype, count, values + t * count);
        const int64_t number = (batch * value_.rows + first + t) * value_.count + head;
        decays[t] = decay_.data[number], betas[t] = beta_.data[number];
      }
      DeltaRuleArgs a = {};
      a.query = queries, a.key = keys, a.vector_stride = dim;
      a.value = values, a.value_stride = count, a.decay = decays, a.beta = betas;
      a.tokens = some, a.dim = dim, a.columns = count, a.scale = scale_;
      a.from = from, a.from_stride = columns, a.state = state, a.state_stride = columns;
      a.out = outs, a.out_stride = count;
      if (value_.rows == 1) {
        // The weights of other layers have driven it from the caches since the last token, and the
        // kernel reads it in columns.
        constexpr int64_t kLineFloats = 64 / sizeof(float);
        for (int64_t i = 0; i < dim; ++i) {
          const float* row = from + i * columns;
          for (int64_t j = 0; j < count; j += kLineFloats) __builtin_prefetch(row + j, 0, 2);
        }
        kernels_.delta_rule(a);
      } else {
        for (int64_t j = 0; j < count; j += kDeltaColumns) {
          in_near_memory(a, j, std::min(kDeltaColumns, count - j), columns_of_state);
        }
      }
      for (int64_t t = 0; t < some; ++t) {
        const int64_t row = (batch * value_.rows + first + t) * value_.count + head;
        kernels_.narrow(outs + t * count, count, value_.dtype,
                        out_ + (row * columns + begin) * bytes_of(value_.dtype));
      }
      from = state;
    }
  }

  // `count` columns from number j on of what `a` has, whose state lies in one piece meanwhile: its
  // rows in the tensor would share a few sets of the L1 cache.
  void in_near_memory(DeltaRuleArgs a, int64_t j, int64_t count, float* near) const {
    float* state = a.state + j;
    copy_rows(a.from + j, a.from_stride, a.dim, count, near, count);
    const int64_t stride = a.state_stride;
    a.from = a.state = near, a.from_stride = a.state_stride = a.columns = count;
    a.value += j, a.out += j;
    kernels_.delta_rule(a);
    copy_rows(near, count, a.dim, count, state, stride);
  }

  static void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t count,
                        float* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(from + i * from_stride, count, to + i * to_stride);
    }
  }

  const Kernels& kernels_;
  const HeadsOf query_, key_, value_;
  FloatBias decay_{std::nullopt, 0}, beta_{std::nullopt, 0};
  const Vectors vectors_;
  std::optional<Tensor> before_;
  float scale_ = 0.0f;
  char* out_ = nullptr;
  float* after_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor> gated_delta_rule(const Tensor& query, const Tensor& key,
                                            const Tensor& value, const Tensor& decay,
                                            const Tensor& beta, const std::optional<Tensor>& state,
                                            std::optional<double> scale, bool normalize) {
  GatedDeltaRule rule(query, key, value, decay, beta, state, scale, normalize);
  Tensor after = rule.empty_state();
  return {rule.run(after), after};
}

Tensor gated_delta_rule_(const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& decay, const Tensor& beta, const Tensor& state,
                         std::optional<double> scale, bool normalize) {
  check_written(state);
  GatedDeltaRule rule(query, key, value, decay, beta, state, scale, normalize);
  return rule.run(state);
}

}  // namespace dynquant
