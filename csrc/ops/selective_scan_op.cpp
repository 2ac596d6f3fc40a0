// selective_scan: the recurrence of state space models, Mamba's and Mamba 2's.
#include <algorithm>

#include "heads.h"
#include "parallel.h"
#include "pieces.h"

namespace dynquant {
namespace {

constexpr int64_t kTokensTogether = 32;
constexpr int64_t kHeadsTogether = 64;        // of one value each, that are the rows of a task
constexpr int64_t kStateTogether = 8192 / 4;  // values that stay in the L1 cache
constexpr int64_t kFloat = sizeof(float);

// Rows of the state: the values of a head, or where heads have a single one, several heads.
class SelectiveScan {
 public:
  SelectiveScan(const Tensor& x, const Tensor& dt, const Tensor& rate, const Tensor& b,
                const Tensor& c, const std::optional<Tensor>& skip,
                const std::optional<Tensor>& state)
      : kernels_(kernels_in_use()), x_(x, "x"), b_(b, "B"), c_(c, "C"), n_(b_.dim) {
    check_same_shape(c, "C", b, "B");
    check_tensor(c, "C", {b.scalar_type()});
    check(b_.batch == x_.batch && b_.rows == x_.rows, "B must have the shape [", x_.batch, ", ",
          x_.rows, ", G, N], got ", ShapeOf(b));
    check(b_.count > 0 && x_.count % b_.count == 0,
          "the heads of x must be a multiple of the groups of B, got ", x_.count, " and ",
          b_.count);
    check(n_ > 0, "B must have N > 0, got ", ShapeOf(b));
    check(x_.dim > 0, "x must have P > 0, got ", ShapeOf(x));
    dt_ = FloatBias(dt, {x_.batch, x_.rows, x_.count}, "dt");
    skip_ = FloatBias(skip, x_.count, "D");
    check_float(rate, "A");
    check((rate.dim() == 1 || (rate.dim() == 2 && rate.size(1) == n_)) && rate.size(0) == x_.count,
          "A must have the shape [", x_.count, "] or [", x_.count, ", ", n_, "], got ",
          ShapeOf(rate));
    rate_is_one_ = rate.dim() == 1;
    rate_ = rate_is_one_ ? FloatBias(rate, x_.count, "A") : FloatBias(rate, {x_.count, n_}, "A");
    if (rate_is_one_ && is_single()) {
      for (int64_t h = 0; h < x_.count; ++h) {
        repeated_.insert(repeated_.end(), static_cast<size_t>(n_), rate_.data[h]);
      }
      rate_is_one_ = false, rate_.data = repeated_.data();
    }
    if (state.has_value()) {
      check_tensor(*state, "state", {ScalarType::Float});
      check_shape(*state, "state, as x and B have it,", {x_.batch, x_.count, x_.dim, n_});
      before_ = dense(*state);
    }
  }

  Tensor empty_state() const { return empty({x_.batch, x_.count, x_.dim, n_}, ScalarType::Float); }

  // What comes out; the state becomes `after`, a dense tensor, which may be the one before.
  Tensor run(const Tensor& after) {
    Tensor y = empty({x_.batch, x_.rows, x_.count, x_.dim}, x_.holder.scalar_type());
    out_ = static_cast<char*>(y.mutable_data_ptr());
    after_ = static_cast<float*>(after.mutable_data_ptr());
    const int64_t of_group = x_.count / b_.count;
    const int64_t heads = is_single() ? std::min(kHeadsTogether, of_group) : 1;
    const int64_t tasks_of_group = heads == 0 ? 0 : ceil_div(of_group, heads);
    const int64_t tasks = x_.batch * b_.count * tasks_of_group;
    constexpr int64_t kCost = 4;  // of one value of the state and one token
    run_range(tasks, heads * x_.dim * n_ * (x_.rows + 1) * kCost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / tasks_of_group % b_.count, at = i % tasks_of_group * heads;
        run_heads(i / tasks_of_group / b_.count, group, group * of_group + at,
                  std::min(heads, of_group - at));
      }
    });
    return y;
  }

 private:
  bool is_single() const { return x_.dim == 1; }

  // `count` heads of a sequence from number `head` on, several of one value each or one.
  void run_heads(int64_t batch, int64_t group, int64_t head, int64_t count) const {
    const int64_t all = count * x_.dim, tokens = std::min(kTokensTogether, x_.rows);
    const int64_t together = std::min(all, std::max<int64_t>(kStateTogether / n_ / 16, 1) * 16);
    Pieces pieces(Purpose::block,
                  {tokens * n_ * kFloat, tokens * n_ * kFloat, tokens * together * kFloat,
                   tokens * together * kFloat, tokens * together * kFloat});
    float* b = pieces.next<float>(tokens * n_);
    float* c = pieces.next<float>(tokens * n_);
    float* x = pieces.next<float>(tokens * together);
    float* dt = pieces.next<float>(tokens * together);
    float* out = pieces.next<float>(tokens * together);
    const int64_t first_of_state = (batch * x_.count + head) * x_.dim * n_;
    float* state = after_ + first_of_state;
    const float* from = state;
    if (before_.has_value()) {
      from = static_cast<const float*>(before_->const_data_ptr()) + first_of_state;
      if (x_.rows == 0 && from != state) std::copy_n(from, all * n_, state);
    } else {
      std::fill_n(state, all * n_, 0.0f);
    }
    for (int64_t first = 0; first < x_.rows; first += tokens, from = state) {
      const int64_t some = std::min(tokens, x_.rows - first);
      for (int64_t t = 0; t < some; ++t) {
        kernels_.widen(b_.heads.at(batch, first + t, group), b_.dtype, n_, b + t * n_);
        kernels_.widen(c_.heads.at(batch, first + t, group), c_.dtype, n_, c + t * n_);
      }
      for (int64_t row = 0; row < all; row += together) {
        const int64_t rows = std::min(together, all - row);
        for (int64_t t = 0; t < some; ++t) {
          take(batch, first + t, head, row, rows, x + t * rows);
          const float* steps = dt_.data + (batch * x_.rows + first + t) * x_.count + head;
          if (is_single()) {
            std::copy_n(steps + row, rows, dt + t * rows);
          } else {
            dt[t] = *steps;
          }
        }
        SelectiveScanArgs a = {};
        a.x = x, a.dt = dt, a.shares_dt = !is_single();
        const int64_t own = is_single() ? head + row : head;
        a.rate = rate_.data + (rate_is_one_ ? own : own * n_);
        a.rate_is_one = rate_is_one_, a.rate_stride = is_single() ? n_ : 0;
        a.b = b, a.c = c, a.skip = skip_.data == nullptr ? nullptr : skip_.data + own;
        a.tokens = some, a.rows = rows, a.n = n_;
        a.from = from + row * n_, a.state = state + row * n_, a.out = out;
        kernels_.selective_scan(a);
        for (int64_t t = 0; t < some; ++t) {
          const int64_t at = ((batch * x_.rows + first + t) * x_.count + head) * x_.dim + row;
          kernels_.narrow(out + t * rows, rows, x_.dtype, out_ + at * bytes_of(x_.dtype));
        }
      }
    }
  }

  // Values of a token for rows of the state.
  void take(int64_t batch, int64_t token, int64_t head, int64_t row, int64_t rows,
            float* to) const {
    const int64_t bytes = bytes_of(x_.dtype);
    if (!is_single()) {
      return kernels_.widen(x_.heads.at(batch, token, head) + row * bytes, x_.dtype, rows, to);
    }
    if (x_.heads.head_stride == bytes) {
      return kernels_.widen(x_.heads.at(batch, token, head + row), x_.dtype, rows, to);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (x_.dtype == Dtype::f32) {
        to[r] = *reinterpret_cast<const float*>(x_.heads.at(batch, token, head + row + r));
        continue;
      }
      kernels_.widen(x_.heads.at(batch, token, head + row + r), x_.dtype, 1, to + r);
    }
  }

  const Kernels& kernels_;
  const HeadsOf x_, b_, c_;
  const int64_t n_;
  FloatBias dt_{std::nullopt, 0}, skip_{std::nullopt, 0}, rate_{std::nullopt, 0};
  std::vector<float> repeated_;
  bool rate_is_one_;
  std::optional<Tensor> before_;
  char* out_ = nullptr;
  float* after_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A,
                                          const Tensor& B, const Tensor& C,
                                          const std::optional<Tensor>& D,
                                          const std::optional<Tensor>& state) {
  SelectiveScan scan(x, dt, A, B, C, D, state);
  Tensor after = scan.empty_state();
  return {scan.run(after), after};
}

Tensor selective_scan_(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                       const Tensor& C, const std::optional<Tensor>& D, const Tensor& state) {
  check_written(state);
  SelectiveScan scan(x, dt, A, B, C, D, state);
  return scan.run(state);
}

}  // namespace dynquant
