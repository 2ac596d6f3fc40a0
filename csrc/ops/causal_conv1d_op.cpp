// causal_conv1d: each channel's convolution with itself, of a position and those before it.
#include <algorithm>

#include "ops.h"
#include "parallel.h"
#include "pieces.h"
#include "transposed.h"

namespace dynquant {
namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kTurnCost = 16;  // of a value that goes from channels to positions, or back

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
    if (length_ > 0) {
      const Lines lines(*this);
      char* out = static_cast<char*>(y.mutable_data_ptr());
      constexpr int64_t kCost = 32;  // of one value
      run_range(batch_ * length_, channels_ * kCost,
                [&](int64_t begin, int64_t end) { run_rows(lines, begin, end, out); });
    }
    void* to = after.mutable_data_ptr();
    if (kept_ > 0 && dtype_ == Dtype::f32) keep(static_cast<float*>(to));
    if (kept_ > 0 && dtype_ != Dtype::f32) keep(static_cast<uint16_t*>(to));
    return {y, after};
  }

 private:
  // The weight as rows of a tap each, and what each sequence has before x as rows of a position;
  // without a state a single row of zeros.
  struct Lines {
    explicit Lines(const CausalConv1d& op) {
      const int64_t channels = op.channels_, kept = op.kept_ * channels;
      const bool has_state = op.state_.has_value(), narrow = has_state && op.dtype_ != Dtype::f32;
      const int64_t values = has_state ? op.batch_ * kept : channels;
      Pieces pieces(Purpose::shared_rows, {op.taps_ * channels * kFloat, values * kFloat,
                                           narrow ? op.batch_ * kept * kFloat : 0});
      float* weights = pieces.next<float>(op.taps_ * channels);
      float* states = pieces.next<float>(values);
      float* widened = pieces.next<float>(narrow ? op.batch_ * kept : 0);
      turn(op.weight_.data, channels, op.taps_, weights);
      weight = weights, state = states;
      if (!has_state) {
        std::fill_n(states, channels, 0.0f);
        return;
      }
      const char* given = static_cast<const char*>(op.state_->const_data_ptr());
      run_range(op.batch_, kept * kTurnCost, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const char* own = given + b * kept * bytes_of(op.dtype_);
          if (narrow) op.kernels_.widen(own, op.dtype_, kept, widened + b * kept);
          const float* from = narrow ? widened + b * kept : reinterpret_cast<const float*>(own);
          turn(from, channels, op.kept_, states + b * kept);
        }
      });
    }
    const float* weight;  // [taps, channels]
    const float* state;   // [batch, kept, channels], or [channels]
  };

  // What a tap multiplies at a position before x, a negative number.
  const float* before(const Lines& lines, int64_t sequence, int64_t position) const {
    if (!state_.has_value()) return lines.state;
    return lines.state + (sequence * kept_ + kept_ + position) * channels_;
  }

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
            p < 0    ? before(lines, b, p)
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
  template <class T>
  void keep(T* after) const {
    const T* before = static_cast<const T*>(state_->const_data_ptr());
    const int64_t taken = std::min(kept_, length_), left = kept_ - taken;
    run_range(batch_ * channels_, kept_ * kTurnCost, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t b = m / channels_, c = m % channels_;
        T* to = after + m * kept_;
        for (int64_t i = 0; i < left; ++i) to[i] = before[m * kept_ + taken + i];
        for (int64_t i = 0; i < taken; ++i) {
          const char* row = x_.data + (b * length_ + length_ - taken + i) * x_.stride;
          to[left + i] = reinterpret_cast<const T*>(row)[c];
        }
      }
    });
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
