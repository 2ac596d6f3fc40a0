// causal_conv1d: each channel's convolution with itself, of a position and those before it.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "pieces.h"
#include "transposed.h"

namespace dynquant {
namespace {

constexpr int64_t kFloat = sizeof(float);

// values[c][i] as rows of one i each.
void turn(const float* values, int64_t channels, int64_t count, float* to) {
  transpose(values, count, channels, count, [&](int64_t i) { return to + i * channels; });
}

class CausalConv1d {
 public:
  CausalConv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& state, Activation activation)
      : kernels_(kernels_in_use()), dtype_(check_float(x, "x")), activation_(activation) {
    check(x.dim() == 3, "x must have three dimensions [B, L, C], got ", ShapeOf(x));
    batch_ = x.size(0), length_ = x.size(1), channels_ = x.size(2);
    check_float(weight, "weight");
    check(weight.dim() == 2 && weight.size(0) == channels_ && weight.size(1) > 0,
          "weight must have the shape [", channels_, ", K] with K > 0, got ", ShapeOf(weight));
    taps_ = weight.size(1);
    weight_ = FloatBias(weight, {channels_, taps_}, "weight");
    bias_ = FloatBias(bias, channels_);
    if (state.has_value()) {
      check_tensor(*state, "state", {x.scalar_type()});
      check(state->dim() == 3 && state->size(0) == batch_ && state->size(1) == channels_ &&
                state->size(2) >= taps_ - 1,
            "state must have the shape [", batch_, ", ", channels_, ", S] with S >= ", taps_ - 1,
            ", got ", ShapeOf(*state));
      state_ = dense(*state);
      kept_ = state->size(2);
    }
    x_ = rows_of(x, "x");
  }

  std::tuple<Tensor, Tensor> run() {
    Tensor y = empty({batch_, length_, channels_}, x_.holder.scalar_type());
    Tensor after = empty({batch_, channels_, kept_}, x_.holder.scalar_type());
    if (batch_ * channels_ == 0) return {y, after};
    const Lines lines(*this);
    const int64_t rows = batch_ * length_, bytes = bytes_of(dtype_);
    char* out = static_cast<char*>(y.mutable_data_ptr());
    constexpr int64_t kCost = 32;  // of one value
    run_range(rows, channels_ * kCost,
              [&](int64_t begin, int64_t end) { run_rows(lines, begin, end, out); });
    if (kept_ > 0) keep(static_cast<char*>(after.mutable_data_ptr()), bytes);
    return {y, after};
  }

 private:
  // The weight as rows of a tap each, and what each sequence has before x as rows of a position.
  struct Lines {
    explicit Lines(const CausalConv1d& op) {
      const int64_t channels = op.channels_, before = op.taps_ - 1;
      const int64_t kept = op.kept_ * channels;
      const bool narrow = op.dtype_ != Dtype::f32;
      Pieces pieces(Purpose::shared_rows,
                    {op.taps_ * channels * kFloat, op.batch_ * before * channels * kFloat,
                     narrow ? kept * kFloat : 0});
      float* weights = pieces.next<float>(op.taps_ * channels);
      float* states = pieces.next<float>(op.batch_ * before * channels);
      float* widened = pieces.next<float>(narrow ? kept : 0);
      turn(op.weight_.data, channels, op.taps_, weights);
      weight = weights, state = states;
      if (!op.state_.has_value()) {
        std::fill_n(states, op.batch_ * before * channels, 0.0f);
        return;
      }
      const char* given = static_cast<const char*>(op.state_->const_data_ptr());
      for (int64_t b = 0; b < op.batch_; ++b) {
        const char* own = given + b * kept * bytes_of(op.dtype_);
        if (narrow) op.kernels_.widen(own, op.dtype_, kept, widened);
        const float* values = narrow ? widened : reinterpret_cast<const float*>(own);
        transpose(values + op.kept_ - before, op.kept_, channels, before,
                  [&](int64_t i) { return states + (b * before + i) * channels; });
      }
    }
    const float* weight;  // [taps, channels]
    const float* state;   // [batch, taps - 1, channels]
  };

  // The rows [begin, end) of all sequences.
  void run_rows(const Lines& lines, int64_t begin, int64_t end, char* out) const {
    const bool narrow = dtype_ != Dtype::f32;
    const int64_t bytes = bytes_of(dtype_);
    Pieces pieces(Purpose::block, {narrow ? taps_ * channels_ * kFloat : 0, channels_ * kFloat});
    float* ring = pieces.next<float>(narrow ? taps_ * channels_ : 0);
    float* sums = pieces.next<float>(channels_);
    std::vector<const float*> rows(static_cast<size_t>(taps_));
    for (int64_t m = begin; m < end; ++m) {
      const int64_t b = m / length_, position = m % length_;
      if (narrow) {  // the rows before it are there, unless it is the first
        const bool is_first = m == begin || position == 0;
        const int64_t first = is_first ? std::max<int64_t>(0, position - taps_ + 1) : position;
        for (int64_t p = first; p <= position; ++p) {
          kernels_.widen(x_.data + (b * length_ + p) * x_.stride, dtype_, channels_,
                         ring + p % taps_ * channels_);
        }
      }
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t p = position - taps_ + 1 + tap;
        rows[static_cast<size_t>(tap)] =
            p < 0    ? lines.state + (b * (taps_ - 1) + p + taps_ - 1) * channels_
            : narrow ? ring + p % taps_ * channels_
                     : reinterpret_cast<const float*>(x_.data + (b * length_ + p) * x_.stride);
      }
      char* to = out + m * channels_ * bytes;
      float* sum = narrow ? sums : reinterpret_cast<float*>(to);
      kernels_.taps({lines.weight, rows.data(), bias_.data, taps_, channels_, sum});
      if (narrow) kernels_.narrow(sums, channels_, dtype_, to);
      if (activation_ != Activation::none) {
        kernels_.activate({activation_, dtype_, to, nullptr, channels_, to});
      }
    }
  }

  // The last positions of each sequence and what was before it.
  void keep(char* after, int64_t bytes) const {
    const char* before = static_cast<const char*>(state_->const_data_ptr());
    const int64_t taken = std::min(kept_, length_), left = kept_ - taken;
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t c = 0; c < channels_; ++c) {
        const int64_t at = (b * channels_ + c) * kept_ * bytes;
        std::memcpy(after + at, before + at + taken * bytes, static_cast<size_t>(left * bytes));
        for (int64_t i = 0; i < taken; ++i) {
          const char* x = x_.data + (b * length_ + length_ - taken + i) * x_.stride + c * bytes;
          std::memcpy(after + at + (left + i) * bytes, x, static_cast<size_t>(bytes));
        }
      }
    }
  }

  const Kernels& kernels_;
  const Dtype dtype_;
  const Activation activation_;
  Rows x_;
  int64_t batch_, length_, channels_, taps_, kept_ = 0;
  FloatBias weight_{std::nullopt, 0}, bias_{std::nullopt, 0};
  std::optional<Tensor> state_;
};

}  // namespace

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& state, int64_t activation) {
  return CausalConv1d(x, weight, bias, state, check_activation(activation, "activation")).run();
}

}  // namespace dynquant
