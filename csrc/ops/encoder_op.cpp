// encoder: attention and feed_forward of layer after layer in one call.
#include <algorithm>

#include "ops.h"
#include "parallel.h"

namespace dynquant {
namespace {

using Given = std::vector<std::optional<Tensor>>;

// Where a layer's tensors begin: packed weight, scale and bias of a linear layer; weight and bias
// of a norm.
enum At : int64_t {
  kQuery = 0,
  kKey = 3,
  kValue = 6,
  kOut = 9,
  kUp = 12,
  kDown = 15,
  kAttentionNorm = 18,
  kFeedForwardNorm = 20,
  kCount = 22,
};

// The tensors of one layer.
struct Layer {
  const std::optional<Tensor>* first;

  const std::optional<Tensor>& at(int64_t i) const { return first[i]; }
  const Tensor& needed(int64_t i) const {
    check(first[i].has_value(), "tensor ", i, " must be given");
    return *first[i];
  }
};

struct Settings {
  int64_t heads, kv_heads, activation;
  double eps;
  bool norm_first;
  const std::optional<Tensor>& mask;
  bool integers, per_token, symmetric;
  int64_t activation_bits;
};

// A layer norm of a layer: in front of the block, or behind it.
struct LayerNorm {
  LayerNorm(const Layer& layer, int64_t at, bool is_here, double eps_) : norm(is_here) {
    if (!is_here) return;
    weight = layer.at(at);
    bias = layer.at(at + 1);
    eps = eps_;
  }
  int64_t norm;
  std::optional<Tensor> weight, bias;
  double eps = 0.0;
};

Tensor run_attention(const Tensor& x, const Layer& w, const Settings& s) {
  const LayerNorm before(w, kAttentionNorm, s.norm_first, s.eps);
  const LayerNorm after(w, kAttentionNorm, !s.norm_first, s.eps);
  return attention(x, w.needed(kQuery), w.needed(kQuery + 1), w.at(kQuery + 2), w.at(kKey),
                   w.at(kKey + 1), w.at(kKey + 2), w.at(kValue), w.at(kValue + 1), w.at(kValue + 2),
                   w.needed(kOut), w.needed(kOut + 1), w.at(kOut + 2), s.heads, s.kv_heads, s.mask,
                   std::nullopt, false, std::nullopt, std::nullopt, std::nullopt, s.integers, x,
                   before.norm, before.weight, before.bias, before.eps, after.norm, after.weight,
                   after.bias, after.eps, s.per_token, s.symmetric, s.activation_bits, false,
                   false);
}

Tensor run_feed_forward(const Tensor& x, const Layer& w, const Settings& s) {
  const LayerNorm before(w, kFeedForwardNorm, s.norm_first, s.eps);
  const LayerNorm after(w, kFeedForwardNorm, !s.norm_first, s.eps);
  return feed_forward(x, w.needed(kUp), w.needed(kUp + 1), w.at(kUp + 2), std::nullopt,
                      std::nullopt, std::nullopt, w.needed(kDown), w.needed(kDown + 1),
                      w.at(kDown + 2), s.activation, 0, x, before.norm, before.weight, before.bias,
                      before.eps, after.norm, after.weight, after.bias, after.eps, s.per_token,
                      s.symmetric, s.activation_bits, false);
}

Tensor run_layers(const Tensor& x, const Given& weights, const Settings& settings) {
  Tensor hidden = x;
  for (size_t i = 0; i < weights.size(); i += kCount) {
    const Layer layer{weights.data() + i};
    try {
      // Each in a scope of its own, as where it is called alone: it may run on another set than the
      // one before, which another thread has forced, and must not find that one's matrix unit.
      {
        const OpScope scope;
        hidden = run_attention(hidden, layer, settings);
      }
      const OpScope scope;
      hidden = run_feed_forward(hidden, layer, settings);
    } catch (const std::runtime_error& error) {
      fail("layer ", i / kCount, ": ", error.what());
    }
  }
  return hidden;
}

// Of the products, on one thread.
double nanoseconds(const Tensor& x, const Given& weights) {
  const int64_t features = x.dim() == 0 ? 1 : std::max<int64_t>(1, x.size(x.dim() - 1));
  const double rows = static_cast<double>(x.numel() / features);
  double values = 0.0;
  for (const std::optional<Tensor>& weight : weights) {
    if (weight.has_value()) values += static_cast<double>(weight->numel());
  }
  const Costs& costs = kernels_in_use().product.costs;
  return values * std::max(rows * costs.multiply_add, costs.weight_byte);
}

}  // namespace

Tensor encoder(const Tensor& x, const Given& weights, int64_t heads, int64_t kv_heads,
               int64_t activation, double eps, bool norm_first, const std::optional<Tensor>& mask,
               bool integers, bool per_token, bool symmetric, int64_t activation_bits) {
  const int64_t given = static_cast<int64_t>(weights.size());
  check(given > 0 && given % kCount == 0, "weights must hold ", kCount,
        " tensors or None for each layer, got ", given);
  const Settings settings{heads, kv_heads, activation, eps,       norm_first,
                          mask,  integers, per_token,  symmetric, activation_bits};
  Tensor y;
  with_team(nanoseconds(x, weights), [&] { y = run_layers(x, weights, settings); });
  return y;
}

}  // namespace dynquant
