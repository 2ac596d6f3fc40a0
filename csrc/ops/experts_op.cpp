// experts: the two products of a mixture's experts with an activation between them, for the rows
// that chose them, to the weighted sum of each token.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/convert.h"
#include "block.h"
#include "grouped_product.h"

namespace dynquant {
namespace {

constexpr GroupedNames kUp = {"weight_up", "weight_scale_up", "bias_up", "n_up"};
constexpr GroupedNames kDown = {"weight_down", "weight_scale_down", "bias_down", "n_down"};

// The choices of all tokens, chosen[T, C], by expert, those of one expert in their own order.
struct Routing {
  std::vector<int64_t> sizes;     // of each expert
  std::vector<int64_t> choices;   // numbers of the choices, t * C + c
  std::vector<int64_t> of_token;  // [T, C]: which of `choices` are a token's, ascending; -1: none

  Routing(const Tensor& chosen, int64_t experts) : sizes(static_cast<size_t>(experts)) {
    const Tensor held = dense(chosen);
    const int64_t* of = static_cast<const int64_t*>(held.const_data_ptr());
    const int64_t count = held.numel(), each = held.size(1);
    for (int64_t i = 0; i < count; ++i) {
      check(of[i] >= 0, "chosen must not be negative, got ", of[i]);
      if (of[i] < experts) ++sizes[static_cast<size_t>(of[i])];
    }
    std::vector<int64_t> next(sizes.size());
    int64_t all = 0;
    for (size_t e = 0; e < sizes.size(); all += sizes[e++]) next[e] = all;
    choices.resize(static_cast<size_t>(all));
    of_token.assign(static_cast<size_t>(count), -1);
    for (int64_t i = 0; i < count; ++i) {
      if (of[i] >= experts) continue;
      const int64_t at = next[static_cast<size_t>(of[i])]++;
      choices[static_cast<size_t>(at)] = i;
      of_token[static_cast<size_t>(i)] = at;
    }
    for (int64_t t = 0; t < count; t += each) {
      std::sort(of_token.begin() + t, of_token.begin() + t + each);
    }
  }

  int64_t rows() const { return static_cast<int64_t>(choices.size()); }
  int64_t active() const {
    return std::count_if(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; });
  }
};

inline float rounded(float value, const float*) { return value; }
template <class T>
inline float rounded(float value, const T*) {
  T narrowed;
  narrow(value, &narrowed);
  return widen(narrowed);
}

// Experts one after the other, and their choices.
struct Block {
  int64_t first, last;  // experts
  int64_t begin, end;   // choices

  int64_t rows() const { return end - begin; }
};

class Experts {
 public:
  Experts(const Tensor& x, const Tensor& chosen, const Tensor& chosen_weights, GroupedWeights up,
          GroupedWeights down, int64_t inner, int64_t activation, int64_t split,
          const ActivationScheme& scheme)
      : kernels_(kernels_in_use()),
        dtype_(check_float(x, "x")),
        bytes_(bytes_of(dtype_)),
        type_(x.scalar_type()),
        x_(rows_of(x, "x")),
        up_(std::move(up)),
        down_(std::move(down)),
        inner_(inner),
        activation_(check_activation(activation, "activation")),
        split_(split),
        scheme_(scheme),
        choices_(chosen.size(1)),
        weights_type_(check_float(chosen_weights, "chosen_weights")),
        routing_(chosen, up_.groups) {
    weights_.resize(static_cast<size_t>(chosen_weights.numel()));
    kernels_.widen(dense(chosen_weights).const_data_ptr(), weights_type_, chosen_weights.numel(),
                   weights_.data());
  }

  Tensor run() const {
    Tensor y = empty({x_.m, down_.n}, type_);
    if (x_.m * down_.n == 0) return y;
    const bool is_wide = dtype_ == Dtype::f32;
    Tensor total = is_wide ? y : empty({x_.m, down_.n}, ScalarType::Float);
    float* const sums = static_cast<float*>(total.mutable_data_ptr());
    const std::vector<Block> blocks = blocks_of_experts();
    int64_t most = 0, most_of_one = 0;
    for (const Block& block : blocks) most = std::max(most, block.rows());
    for (int64_t size : routing_.sizes) most_of_one = std::max(most_of_one, size);
    Tensor gathered = empty({most, x_.k}, type_), hidden = empty({most_of_one, up_.n}, type_);
    Tensor results = empty({most, down_.n}, type_);
    const auto data = [](Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); };
    with_team(nanoseconds(), [&] {
      run_range(x_.m, down_.n * 4, [&](int64_t begin, int64_t end) {
        std::fill(sums + begin * down_.n, sums + end * down_.n, 0.0f);
      });
      for (const Block& block : blocks) {
        gather(block, data(gathered));
        multiply(block, data(gathered), data(hidden), data(results));
        add(block, data(results), sums);
      }
      if (!is_wide) narrow_rows(sums, data(y));
    });
    return y;
  }

 private:
  double nanoseconds() const {
    const int64_t active = std::max<int64_t>(1, routing_.active()), m = routing_.rows() / active;
    const auto of_one = [&](int64_t n, int64_t k) {
      return product_nanoseconds(m, n, k, product_for(kernels_, m, n, k).costs);
    };
    return static_cast<double>(active) * (of_one(up_.n, x_.k) + of_one(down_.n, inner_));
  }

  // Of as many as their rows fit into that memory, or of one.
  std::vector<Block> blocks_of_experts() const {
    constexpr int64_t kBytes = 32 << 20;
    const int64_t row = (x_.k + down_.n) * bytes_;
    const int64_t most = std::max<int64_t>(1, kBytes / std::max<int64_t>(1, row));
    std::vector<Block> blocks;
    Block block = {0, 0, 0, 0};
    for (int64_t size : routing_.sizes) {
      if (block.rows() > 0 && block.rows() + size > most) {
        blocks.push_back(block);
        block = {block.last, block.last, block.end, block.end};
      }
      ++block.last;
      block.end += size;
    }
    if (block.rows() > 0) blocks.push_back(block);
    return blocks;
  }

  void gather(const Block& block, char* to) const {
    const int64_t row = x_.k * bytes_;
    run_rows(block.rows(), row, [&](int64_t m) {
      const int64_t token = routing_.choices[static_cast<size_t>(block.begin + m)] / choices_;
      std::memcpy(to + m * row, x_.data + token * x_.stride, static_cast<size_t>(row));
    });
  }

  // One expert after the other: what lies between its products is in the caches then.
  void multiply(const Block& block, char* gathered, char* hidden, char* results) const {
    const int64_t in = x_.k * bytes_, between = up_.n * bytes_, out = down_.n * bytes_;
    for (int64_t expert = block.first; expert < block.last; ++expert) {
      const int64_t m = routing_.sizes[static_cast<size_t>(expert)];
      if (m == 0) continue;
      multiply_packed(kernels_, up_, {expert, rows_at(gathered, m, x_.k, in), hidden}, dtype_,
                      bytes_, scheme_);
      activate(m, hidden);
      char* activated = hidden + (split_ == 2 ? inner_ * bytes_ : 0);
      multiply_packed(kernels_, down_, {expert, rows_at(activated, m, inner_, between), results},
                      dtype_, bytes_, scheme_);
      gathered += m * in;
      results += m * out;
    }
  }

  void activate(int64_t rows, char* hidden) const {
    const int64_t half = inner_ * bytes_;
    run_rows(rows, inner_ * kExpCost, [&](int64_t m) {
      char* row = hidden + m * up_.n * bytes_;
      char* x = split_ == 2 ? row + half : row;
      const char* by = split_ == 0 ? nullptr : split_ == 1 ? row + half : row;
      kernels_.activate({activation_, dtype_, x, by, inner_, x});
    });
  }

  // In the order of the experts, each product rounded to its type.
  template <class T, class Product>
  void add_rows(const Block& block, const T* results, float* sums, const Product* type) const {
    const int64_t n = down_.n;
    run_range(x_.m, choices_ * n * bytes_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* __restrict__ const sum = sums + t * n;
        for (int64_t c = 0; c < choices_; ++c) {
          const int64_t at = routing_.of_token[static_cast<size_t>(t * choices_ + c)];
          if (at < block.begin || at >= block.end) continue;
          const T* row = results + (at - block.begin) * n;
          const int64_t choice = routing_.choices[static_cast<size_t>(at)];
          const float weight = weights_[static_cast<size_t>(choice)];
          for (int64_t i = 0; i < n; ++i) sum[i] += rounded(widen(row[i]) * weight, type);
        }
      }
    });
  }

  void add(const Block& block, const char* results, float* sums) const {
    const bool is_wide = dtype_ == Dtype::f32 || weights_type_ != dtype_;
    with_type_of_rows([&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* from = reinterpret_cast<const T*>(results);
      constexpr const float* kWide = nullptr;
      if (is_wide) return add_rows(block, from, sums, kWide);
      add_rows(block, from, sums, static_cast<const T*>(nullptr));
    });
  }

  void narrow_rows(const float* sums, char* y) const {
    with_type_of_rows([&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* const to = reinterpret_cast<T*>(y);
      run_range(x_.m * down_.n, static_cast<int64_t>(sizeof(float)),
                [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) narrow(sums[i], to + i);
                });
    });
  }

  template <class F>
  void with_type_of_rows(const F& f) const {
    if (dtype_ == Dtype::f32) return f(static_cast<float*>(nullptr));
    if (dtype_ == Dtype::bf16) return f(static_cast<Bfloat16*>(nullptr));
    f(static_cast<Half*>(nullptr));
  }

  const Kernels& kernels_;
  const Dtype dtype_;
  const int64_t bytes_;
  const ScalarType type_;
  const Rows x_;
  const GroupedWeights up_, down_;
  const int64_t inner_;  // values between both products
  const Activation activation_;
  const int64_t split_;
  const ActivationScheme scheme_;
  const int64_t choices_;
  const Dtype weights_type_;
  const Routing routing_;
  std::vector<float> weights_;  // [T, C]
};

}  // namespace

Tensor experts(const Tensor& x, const Tensor& chosen, const Tensor& chosen_weights,
               const Tensor& weight_up, const Tensor& weight_scale_up,
               const std::optional<Tensor>& bias_up, int64_t n_up, const Tensor& weight_down,
               const Tensor& weight_scale_down, const std::optional<Tensor>& bias_down,
               int64_t n_down, int64_t activation, int64_t split, bool per_token, bool symmetric,
               int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  check_float(x, "x");
  const int64_t k = checked_depth(x);
  check_tensor(chosen, "chosen", {ScalarType::Long});
  check(chosen.dim() == 2 && chosen.size(0) == x.size(0), "chosen must have the shape [", x.size(0),
        ", C], got ", ShapeOf(chosen));
  check_float(chosen_weights, "chosen_weights");
  check_shape(chosen_weights, "chosen_weights", {chosen.size(0), chosen.size(1)});
  check(split >= 0 && split <= 2,
        "split must be 0 (no gate), 1 (weight_up has the gate's rows first) or 2 (last), got ",
        split);
  check(split == 0 || n_up % 2 == 0, "n_up must be even where split is ", split, ", got ", n_up);
  const int64_t inner = split == 0 ? n_up : n_up / 2;
  const int64_t experts = weight_up.dim() == 2 ? weight_up.size(0) : 0;
  GroupedWeights up(experts, k, weight_up, weight_scale_up, bias_up, n_up, kUp);
  GroupedWeights down(experts, inner, weight_down, weight_scale_down, bias_down, n_down, kDown);
  return Experts(x, chosen, chosen_weights, std::move(up), std::move(down), inner, activation,
                 split, scheme)
      .run();
}

}  // namespace dynquant
