// What becomes of an attention's scores: rows that share all or see different keys.
#include <algorithm>
#include <cmath>

#include "attention_core.h"

namespace dynquant {

// The scores of rows [begin, end) of a head become probabilities. Behind a row's last one there are
// zeros, up to `filled` of them.
void AttentionCore::score(Scored& scored, const float* value_scale, int64_t b, int64_t head,
                          int64_t begin, int64_t end, int64_t keys, int64_t filled) const {
  const bool has_added = added_[0].has_value() || added_[1].has_value();
  bool are_alike = !causal_;  // all rows
  for (const std::optional<Added>& one : added_) {
    are_alike = are_alike && (!one.has_value() || one->is_same_for_rows());
  }
  // Of several causal rows the later ones see more. What an earlier one does not, its scores hide,
  // unless something that is added or a factor makes another number of that.
  const bool one_by_one = causal_ && (has_added || factor() <= 0.0f ||
                                      !(value_scale == nullptr || scored.has_finite_scales));
  const int64_t together = are_alike ? end - begin : one_by_one ? 1 : kRowsTogether;
  for (int64_t first = begin, last; first < end; first = last) {
    last = std::min(end, first + together);
    const int64_t r = first - begin;
    ScoresArgs a = {};
    a.scores = scored.scores + r * scored.stride;
    a.n = causal_ ? std::min(keys, last) : keys;
    a.scale = factor();
    a.rows = last - first;
    a.stride = scored.stride;
    if (softcap_ > 0.0f) {
      for (int64_t row = 0; row < a.rows; ++row) cap(a.scores + row * a.stride, a.n);
    }
    if (causal_) {
      for (int64_t row = first; row < last; ++row) {
        float* scores = a.scores + (row - first) * a.stride;
        std::fill(scores + std::min(a.n, row + 1), scores + a.n, -INFINITY);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (added_[i].has_value()) add(*added_[i], scored, i, b, head, first, last, a);
    }
    a.value_scale = value_scale;
    a.sink = sinks_.empty() ? nullptr : &sinks_[static_cast<size_t>(head)];
    a.sum = scored.sums + r;
    a.range = scored.ranges + r;
    kernels_.scores(a);
    for (int64_t row = 0; row < a.rows && filled_up(a.n) < filled; ++row) {
      float* scores = a.scores + row * a.stride;
      std::fill(scores + filled_up(a.n), scores + filled, 0.0f);
    }
  }
}

void AttentionCore::cap(float* scores, int64_t n) const {
  const float inside = scale_ / softcap_;
  for (int64_t i = 0; i < n; ++i) scores[i] *= inside;
  kernels_.activate({Activation::tanh, Dtype::f32, scores, nullptr, n, scores});
}

// What is added as number i to rows [first, last), for the kernel.
void AttentionCore::add(const Added& added, Scored& scored, int i, int64_t b, int64_t head,
                        int64_t first, int64_t last, ScoresArgs& to) const {
  to.added[i] = scored.added[i];
  to.added_stride[i] = added.is_same_for_rows() ? 0 : filled_up(shape_.keys);
  if (added.is_same_for_rows()) {
    const char* row = added.row(b, head, first);
    if (row != scored.added_from[i]) added.widen(kernels_, row, shape_.keys, scored.added[i]);
    scored.added_from[i] = row;
    return;
  }
  for (int64_t row = first; row < last; ++row) {
    added.widen(kernels_, added.row(b, head, row), to.n,
                scored.added[i] + (row - first) * to.added_stride[i]);
  }
}

double AttentionCore::magnitude(const float* values, int64_t count) const {
  const Range range = kernels_.range(values, Dtype::f32, count);
  return range.has_nan ? NAN : std::max(-range.lo, range.hi);
}

}  // namespace dynquant
