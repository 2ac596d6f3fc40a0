// Attention in floats for few rows, as of one token behind a cache: what takes long is reading keys
// and values. Neither is copied, the heads of the query that share them are rows of one product,
// and values from memory are read of several heads side by side.
#include "attention_core.h"

namespace dynquant {

void AttentionCore::attend_few(const AttentionHeads& of, int64_t b, int64_t kv_begin,
                               int64_t kv_end, int64_t begin, int64_t end, Fetch& fetch) const {
  const int64_t s = shape_.keys, d = shape_.dim, rows = end - begin;
  const int64_t group = shape_.heads / shape_.kv_heads;
  const int64_t together = of.is_far ? std::min<int64_t>(kv_end - kv_begin, heads_together(d)) : 1;
  const int64_t stride = row_stride_of(s);
  const int64_t fitting = std::max(kWholeRows, kScoreBytes / (stride * 4)) / (group * together);
  const int64_t block = std::clamp<int64_t>(fitting, 1, rows), most = together * group * block;
  const int64_t scales = kept_dtype_ == Dtype::i8 ? s : 0;
  const auto floats = [](int64_t count) { return count * static_cast<int64_t>(sizeof(float)); };
  Pieces pieces(Purpose::attention,
                {floats(most * stride), floats(most), most * static_cast<int64_t>(sizeof(Range)),
                 floats(kRowsTogether * stride), floats(kRowsTogether * stride),
                 floats(group * block * d), floats(most * d), floats(scales), floats(scales)});
  Scored scored = {};
  scored.stride = stride;
  float* const scores = pieces.next<float>(most * stride);
  float* const sums = pieces.next<float>(most);
  scored.ranges = pieces.next<Range>(most);
  for (float*& row : scored.added) row = pieces.next<float>(kRowsTogether * stride);
  float* const queries = pieces.next<float>(group * block * d);
  float* const results = pieces.next<float>(most * d);
  for (float*& row : scored.gathered) row = pieces.next<float>(scales);

  for (int64_t first = kv_begin; first < kv_end; first += together) {
    const int64_t heads = std::min(together, kv_end - first);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t last = std::min(row + block, end), m = last - row;
      // Keys behind the last row's own count for nothing.
      const int64_t keys = causal_ ? std::min(s, last) : s;
      for (int64_t i = 0; i < heads * group; ++i) {
        const int64_t head = first * group + i, kv_head = head / group;
        scored.scores = scores + i * m * stride;
        scored.sums = sums + i * m;
        if (head % group == 0) {
          for (int64_t g = 0; g < group; ++g) {
            widen(of.query, b, head + g, row, last, queries + g * m * d);
          }
          read_scales(of, b, kv_head, scored);
          multiply_keys(queries, group * m, of.key, b, kv_head, keys, scored);
        }
        score(scored, scored.value_scale, b, head, row, last, keys, s);
      }
      // All keys, whatever the block: a value that is not finite counts with p = 0 too.
      WeightedSumsArgs a = {};
      a.weights = scores;
      a.weight_stride = stride;
      a.rows = group * m;
      a.vectors = of.value.at(b, 0, first);
      a.dtype = kept_dtype_;
      a.vector_stride = of.value.row_stride / kept_bytes_;
      a.n = s;
      a.dim = d;
      a.out = results;
      a.out_stride = d;
      a.heads = heads;
      a.head_stride = of.value.head_stride / kept_bytes_;
      kernels_.weighted_sums(a);
      for (int64_t i = 0; i < heads * group; ++i) {
        divide(results + i * m * d, d, sums + i * m, of.out, b, first * group + i, row, last,
               fetch);
      }
    }
  }
}

}  // namespace dynquant
