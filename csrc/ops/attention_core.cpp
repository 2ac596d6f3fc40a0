#include "attention_core.h"

#include <float.h>

#include <cmath>

#include "../cpu/convert.h"
#include "../cpu/pack.h"
#include "head_rows.h"

namespace dynquant {

// What a thread needs for some key-value heads of a sequence and a block of rows of one head.
struct AttentionCore::Memory : Scored {
  int64_t block;  // rows of a block at most
  float* results;
  QuantizedHeads probabilities;  // the rows of the block, as if they were heads
  // In integers: the bytes of each head, [heads, rows, D], and their scales, and of one key-value
  // head the key as a packed weight [S, D] and the value as one [D, S].
  QuantizedHeads query, key, value;
  int8_t *keys, *values;
  // In floats: the key as a weight [S, D] and the value as one [D, S], in strips, and the query's
  // rows.
  float *key_strips, *value_strips, *queries;
  float* ordered;  // what softmax leaves of some rows, in the order of strips; where keys are many
  // Of a head, where a row may see fewer keys: whether values are finite, and the greatest number
  // in the keys where a mask hides some.
  bool values_are_finite;
  double most_of_keys;
};

// A head: its number, that among the quantized ones, its key-value head among those, and which row
// of the query is the first of the quantized ones.
struct AttentionCore::Place {
  int64_t head, query, kv, first_row;
};

namespace {

// Of a weight [n, k] in strips.
int64_t strip_values(int64_t n, int64_t k) {
  return ceil_div(n, kStripColumns) * kStripColumns * strip_rows_of(k);
}
// Between rows of results in floats, which strips write.
int64_t result_stride_of(int64_t dim) { return ceil_div(dim, kStripColumns) * kStripColumns; }

}  // namespace

AttentionCore::AttentionCore(const Kernels& kernels, Dtype dtype, Dtype kept_dtype,
                             const AttentionShape& shape, const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& position_bias, bool is_causal,
                             std::optional<double> scale, bool integers)
    : kernels_(kernels),
      dtype_(dtype),
      kept_dtype_(kept_dtype),
      kept_bytes_(bytes_of(kept_dtype)),
      shape_(shape),
      causal_(is_causal),
      integers_(integers) {
  check(!integers || shape.keys <= kMaxK, "key has ", shape.keys, " rows, more than ", kMaxK,
        ", beyond which int32 sums may overflow; integers=False takes them");
  const int64_t wanted[4] = {shape.batch, shape.heads, shape.rows, shape.keys};
  if (position_bias.has_value()) added_[0].emplace(*position_bias, "position_bias", false, wanted);
  if (mask.has_value()) added_[1].emplace(*mask, "mask", true, wanted);
  const double usual = 1.0 / std::sqrt(static_cast<double>(shape.dim));
  scale_ = static_cast<float>(scale.value_or(usual));
  check(std::isfinite(scale_), "scale must be finite, got ", scale.value_or(usual));
}

void AttentionCore::cap_scores(double softcap) {
  softcap_ = static_cast<float>(softcap);
  check(softcap_ >= FLT_MIN && std::isfinite(softcap_) && std::isfinite(scale_ / softcap_),
        "softcap must be positive and finite, and scale / softcap finite, got ", softcap);
}

void AttentionCore::add_sinks(const Tensor& sinks) {
  const Dtype dtype = check_float(sinks, "sinks");
  check_shape(sinks, "sinks", {shape_.heads});
  sinks_.resize(static_cast<size_t>(shape_.heads));
  const Tensor together = dense(sinks);
  kernels_.widen(together.const_data_ptr(), dtype, shape_.heads, sinks_.data());
}

void AttentionCore::quantize(const Heads& from, Dtype dtype, int64_t b, int64_t first_head,
                             int64_t heads, int64_t begin, int64_t end, bool symmetric,
                             const QuantizedHeads& to) const {
  if (heads == 1) {
    return quantize_rows(kernels_, from.at(b, begin, first_head), dtype, from.row_stride,
                         end - begin, shape_.dim, to.q, to.scale,
                         symmetric ? nullptr : to.zero_point);
  }
  QuantizeVectorsArgs a = {};
  a.dtype = dtype;
  a.count = heads;
  a.x_stride = from.head_stride / bytes_of(dtype);
  a.k = shape_.dim;
  a.ahead = 4 * from.row_stride;
  a.symmetric = symmetric;
  a.q_stride = to.q_stride;
  a.value_stride = to.value_stride;
  // Row by row, since the heads of a row lie together.
  for (int64_t row = begin; row < end; ++row) {
    a.x = from.at(b, row, first_head);
    a.q = to.q + (row - begin) * shape_.dim;
    a.scale = to.scale + (row - begin);
    a.zero_point = symmetric ? nullptr : to.zero_point + (row - begin);
    kernels_.quantize_vectors(a);
  }
}

void AttentionCore::pack(Memory& memory, int64_t kv_head) const {
  const int64_t s = shape_.keys, d = shape_.dim;
  const int8_t* key = reinterpret_cast<const int8_t*>(memory.key.bytes_of(kv_head));
  for (int64_t p = 0; p < panels_of(s); ++p) {
    pack_panel(key, d, s, d, p, memory.keys - kHeaderBytes);
  }
  const int8_t* value = reinterpret_cast<const int8_t*>(memory.value.bytes_of(kv_head));
  kernels_.pack_transposed({value, d, s, d, memory.values});
  if (!reads_fewer_keys()) sum_values(memory, s);
  if (sees_fewer_keys()) {
    memory.values_are_finite = std::isfinite(magnitude(memory.value.scales_of(kv_head), s));
    memory.has_finite_scales = memory.values_are_finite;
  }
  if (hides_keys()) memory.most_of_keys = 128.0 * magnitude(memory.key.scales_of(kv_head), s);
}

void AttentionCore::sum_values(const Memory& memory, int64_t keys) const {
  if (kernels_.sum_columns != nullptr) kernels_.sum_columns(memory.values, shape_.dim, keys);
}

void AttentionCore::lay_strips(const AttentionHeads& of, int64_t b, int64_t kv_head,
                               Memory& memory) const {
  const int64_t s = shape_.keys, d = shape_.dim;
  kernels_.lay_strips({of.key.at(b, 0, kv_head), kept_dtype_, of.key.row_stride / kept_bytes_, 1, s,
                       d, memory.key_strips});
  kernels_.lay_strips({of.value.at(b, 0, kv_head), kept_dtype_, 1,
                       of.value.row_stride / kept_bytes_, d, s, memory.value_strips});
  if (sees_fewer_keys()) {
    memory.values_are_finite = std::isfinite(magnitude(memory.value_strips, strip_values(d, s)));
  }
  if (hides_keys()) memory.most_of_keys = magnitude(memory.key_strips, strip_values(s, d));
}

namespace {

// Rows of probabilities times the values' scales, whose ranges are known.
struct ProbabilityRows {
  const float* rows;
  int64_t stride;
  const Range* ranges;
  int64_t k;

  int64_t bytes() const { return 1; }
  StagedRow stage(const Product& product, int64_t m, uint8_t* staged, uint8_t* low) const {
    return stage_floats(product, rows + m * stride, Dtype::f32, k,
                        choose_qparams(ranges[m], false, 8), false, 8, staged, low);
  }
};

}  // namespace

// The rows of probabilities in the block's memory, as bytes.
StagedRows AttentionCore::quantize_scores(const Product& product, const Memory& memory, int64_t m,
                                          int64_t k) const {
  if (!StagedRows::reads_plain(product)) {
    const ProbabilityRows rows{memory.scores, memory.stride, memory.ranges, k};
    return stage_head(product, rows, k, m);
  }
  QuantizeVectorsArgs a = {};
  a.x = memory.scores;
  a.dtype = Dtype::f32;
  a.count = m;
  a.x_stride = memory.stride;
  // A whole group: zeros lie behind a row's last score, or values of zero behind the last key.
  a.k = groups_of(k) * kGroup;
  a.range = memory.ranges;
  a.q = memory.probabilities.q;
  a.q_stride = memory.probabilities.q_stride;
  a.scale = memory.probabilities.scale;
  a.zero_point = memory.probabilities.zero_point;
  a.value_stride = 1;
  kernels_.quantize_vectors(a);
  return {product, k, a.q, a.q_stride, a.scale, a.zero_point};
}

void AttentionCore::widen(const Heads& query, int64_t b, int64_t head, int64_t begin, int64_t end,
                          float* to) const {
  for (int64_t row = begin; row < end; ++row) {
    kernels_.widen(query.at(b, row, head), dtype_, shape_.dim, to + (row - begin) * shape_.dim);
  }
}

void AttentionCore::read_scales(const AttentionHeads& of, int64_t b, int64_t kv_head,
                                Scored& to) const {
  if (kept_dtype_ != Dtype::i8) return;
  const auto read = [&](const Heads& scale, float* row) -> const float* {
    const char* first = scale.at(b, 0, kv_head);
    if (scale.row_stride == sizeof(float)) return reinterpret_cast<const float*>(first);
    widen_strided<float>(first, scale.row_stride, shape_.keys, row);
    return row;
  };
  to.key_scale = read(of.key_scale, to.gathered[0]);
  to.value_scale = read(of.value_scale, to.gathered[1]);
  if (causal_) to.has_finite_scales = std::isfinite(magnitude(to.value_scale, shape_.keys));
}

void AttentionCore::multiply_keys(const float* queries, int64_t m, const Heads& key, int64_t b,
                                  int64_t kv_head, int64_t keys, const Scored& to) const {
  const int64_t d = shape_.dim;
  kernels_.half_gemm({queries, d, m, key.at(b, 0, kv_head), kept_dtype_,
                      key.row_stride / kept_bytes_, d, 0, keys, nullptr, to.scores, Dtype::f32,
                      to.stride});
  scale_keys(to, m, keys);
}

void AttentionCore::scale_keys(const Scored& to, int64_t m, int64_t keys) const {
  if (kept_dtype_ != Dtype::i8) return;
  for (int64_t i = 0; i < m; ++i) {
    float* row = to.scores + i * to.stride;
    kernels_.activate({Activation::none, Dtype::f32, row, to.key_scale, keys, row});
  }
}

void AttentionCore::divide(const float* results, int64_t stride, const float* sums,
                           const Heads& out, int64_t b, int64_t head, int64_t begin, int64_t end,
                           Fetch& fetch) const {
  const int64_t d = shape_.dim;
  kernels_.divide(
      {results, d, sums, dtype_, out.at(b, begin, head), end - begin, stride, out.row_stride});
  for (int64_t row = begin; row < end; ++row) fetch.some();
}

// How many keys the rows [begin, end) of a head see: those behind count for nothing.
int64_t AttentionCore::keys_seen(const Memory& memory, int64_t b, const Place& place, int64_t begin,
                                 int64_t end) const {
  if (causal_) return std::min(shape_.keys, end);
  const bool may_skip = hides_keys() && memory.values_are_finite && kept_dtype_ != Dtype::i8;
  if (!may_skip) return shape_.keys;
  // A score that is not finite would be seen through the mask.
  const int64_t from = begin - place.first_row, m = end - begin;
  const double query = integers_ ? 255.0 * magnitude(memory.query.scales_of(place.query) + from, m)
                                 : magnitude(memory.queries, m * shape_.dim);
  const double products = query * memory.most_of_keys * static_cast<double>(shape_.dim);
  if (!(products * std::max(1.0f, std::abs(scale_)) < FLT_MAX / 4)) return shape_.keys;
  int64_t seen = 1;
  for (int64_t row = end - 1; row >= begin && seen < shape_.keys; --row) {
    seen = added_[1]->seen(added_[1]->row(b, place.head, row), seen, shape_.keys);
    if (added_[1]->is_same_for_rows()) break;
  }
  return seen;
}

void AttentionCore::attend_rows(const AttentionHeads& of, int64_t b, const Place& place,
                                int64_t begin, int64_t end, Memory& memory, Fetch& fetch) const {
  const int64_t m = end - begin, d = shape_.dim;
  if (!integers_) widen(of.query, b, place.head, begin, end, memory.queries);
  const int64_t s = keys_seen(memory, b, place, begin, end);
  const auto multiply = [&](const StagedRows& rows, const Packed& weight, const float* weight_scale,
                            bool per_channel, float* to, int64_t to_stride) {
    EpilogueArgs epilogue = {};
    epilogue.weight_scale = weight_scale;
    epilogue.per_channel = per_channel;
    epilogue.out = to;
    epilogue.out_dtype = Dtype::f32;
    epilogue.out_stride = to_stride;
    rows.multiply(0, m, weight, 0, weight.n, epilogue, false);
  };

  if (integers_) {
    const int64_t from = begin - place.first_row;
    const ByteRows rows = {memory.query.bytes_of(place.query) + from * d,
                           memory.query.scales_of(place.query) + from,
                           memory.query.zero_points_of(place.query) + from, d};
    multiply(rows.staged(product_for(kernels_, m, s, d), m), Packed{memory.keys, s, d},
             memory.key.scales_of(place.kv), true, memory.scores, memory.stride);
  } else {
    kernels_.strips_gemm(
        {memory.queries, d, false, m, d, memory.key_strips, d, s, memory.scores, memory.stride});
    scale_keys(memory, m, s);
  }

  // A value that is not finite counts with p = 0 too, behind the last key that is seen as well.
  const bool reads_fewer = integers_ ? reads_fewer_keys() : memory.values_are_finite;
  const int64_t read = reads_fewer ? s : shape_.keys, filled = groups_of(read) * kGroup;
  const float* value_scale = integers_ ? memory.value.scales_of(place.kv) : memory.value_scale;
  score(memory, value_scale, b, place.head, begin, end, s, filled);

  if (integers_) {
    const float one = 1.0f;
    if (reads_fewer_keys()) sum_values(memory, read);
    multiply(quantize_scores(product_for(kernels_, m, d, read), memory, m, read),
             Packed{memory.values, d, read}, &one, false, memory.results, d);
  } else {
    const bool ordered = read >= kernels_.ordered_from;
    if (ordered) {
      kernels_.order_rows(
          {memory.scores, Dtype::f32, memory.stride, m, read, memory.ordered, memory.stride});
    }
    kernels_.strips_gemm({ordered ? memory.ordered : memory.scores, memory.stride, ordered, m, read,
                          memory.value_strips, shape_.keys, d, memory.results,
                          result_stride_of(d)});
  }
  divide(memory.results, integers_ ? d : result_stride_of(d), memory.sums, of.out, b, place.head,
         begin, end, fetch);
}

void AttentionCore::attend(const AttentionHeads& of, int64_t b, int64_t kv_begin, int64_t kv_end,
                           int64_t begin, int64_t end, Fetch& fetch) const {
  if (are_few(end - begin)) return attend_few(of, b, kv_begin, kv_end, begin, end, fetch);
  constexpr int64_t kQuantizedBytes = 256 * 1024;  // of heads: they wait in the L2 cache
  const int64_t s = shape_.keys, d = shape_.dim, rows = end - begin, filled = filled_up(s);
  const int64_t group = shape_.heads / shape_.kv_heads;
  Memory memory = {};
  memory.stride = row_stride_of(s);
  const int64_t fitting = kScoreBytes / (memory.stride * 4) / kWholeRows * kWholeRows;
  memory.block = std::min(std::clamp<int64_t>(fitting, kWholeRows, 192), rows);
  const int64_t block = memory.block, stride = memory.stride;
  const int64_t most = std::max<int64_t>(1, kQuantizedBytes / ((group * rows + 2 * s) * d));
  const int64_t together = integers_ ? std::min(kv_end - kv_begin, most) : 1;
  const int64_t key_bytes = integers_ ? panels_of(s) * panel_bytes(d) : 0;
  const int64_t value_bytes = integers_ ? panels_of(d) * panel_bytes(s) : 0;
  const int64_t key_strips = integers_ ? 0 : strip_values(s, d);
  const int64_t value_strips = integers_ ? 0 : strip_values(d, s);
  const int64_t float_queries = integers_ ? 0 : block * d, results = block * result_stride_of(d);
  const int64_t kv_heads = integers_ ? together : 0, query_heads = kv_heads * group;
  const int64_t ordered = integers_ || s < kernels_.ordered_from ? 0 : block * stride;
  const int64_t given_scales = kept_dtype_ == Dtype::i8 ? s : 0;
  // A line more between heads: at powers of two they would share few cache sets.
  const int64_t kv_bytes = s * d + kTileLine, query_bytes = rows * d + kTileLine;
  const int64_t kv_values = row_stride_of(s), query_values = row_stride_of(rows);
  const auto floats = [](int64_t count) { return count * static_cast<int64_t>(sizeof(float)); };
  const int64_t range_bytes = block * static_cast<int64_t>(sizeof(Range));
  Pieces pieces(Purpose::attention, {floats(block * stride),
                                     floats(results),
                                     floats(block),
                                     range_bytes,
                                     floats(kRowsTogether * filled),
                                     floats(kRowsTogether * filled),
                                     block * filled,
                                     floats(block),
                                     floats(block),
                                     query_heads * query_bytes,
                                     floats(query_heads * query_values),
                                     floats(query_heads * query_values),
                                     kv_heads * kv_bytes,
                                     floats(kv_heads * kv_values),
                                     kv_heads * kv_bytes,
                                     floats(kv_heads * kv_values),
                                     key_bytes,
                                     value_bytes,
                                     floats(float_queries),
                                     floats(key_strips),
                                     floats(value_strips),
                                     floats(ordered),
                                     floats(given_scales),
                                     floats(given_scales)});
  memory.scores = pieces.next<float>(block * stride);
  memory.results = pieces.next<float>(results);
  memory.sums = pieces.next<float>(block);
  memory.ranges = pieces.next<Range>(block);
  for (float*& row : memory.added) row = pieces.next<float>(kRowsTogether * filled);
  memory.probabilities = {filled, 1, pieces.next<uint8_t>(block * filled),
                          pieces.next<float>(block), pieces.next<int32_t>(block)};
  memory.query = {query_bytes, query_values, pieces.next<uint8_t>(query_heads * query_bytes),
                  pieces.next<float>(query_heads * query_values),
                  pieces.next<int32_t>(query_heads * query_values)};
  for (QuantizedHeads* heads : {&memory.key, &memory.value}) {
    *heads = {kv_bytes, kv_values, pieces.next<uint8_t>(kv_heads * kv_bytes),
              pieces.next<float>(kv_heads * kv_values), nullptr};
  }
  memory.keys = pieces.next<int8_t>(key_bytes);
  memory.values = pieces.next<int8_t>(value_bytes);
  memory.queries = pieces.next<float>(float_queries);
  memory.key_strips = pieces.next<float>(key_strips);
  memory.value_strips = pieces.next<float>(value_strips);
  memory.ordered = pieces.next<float>(ordered);
  for (float*& row : memory.gathered) row = pieces.next<float>(given_scales);

  for (int64_t first = kv_begin; first < kv_end; first += together) {
    const int64_t count = std::min(together, kv_end - first);
    if (integers_) {
      quantize(of.query, dtype_, b, first * group, count * group, begin, end, false, memory.query);
      quantize(of.key, kept_dtype_, b, first, count, 0, s, true, memory.key);
      quantize(of.value, kept_dtype_, b, first, count, 0, s, true, memory.value);
    }
    for (int64_t head = 0; head < count * group; ++head) {
      const Place place = {first * group + head, head, head / group, begin};
      if (head % group == 0 && integers_) pack(memory, place.kv);
      if (head % group == 0 && !integers_) {
        lay_strips(of, b, first + place.kv, memory);
        read_scales(of, b, first + place.kv, memory);
      }
      for (int64_t row = begin; row < end; row += block) {
        attend_rows(of, b, place, row, std::min(row + block, end), memory, fetch);
      }
    }
  }
}

// Within a quarter of what it takes on AVX512-VNNI, for 16 to 512 rows of 32 to 128 values. With
// fewer, keys and values are read for little else: a byte counts for what a second core spares of
// it, since two read memory 1.2 to 1.4 times as fast as one.
double AttentionCore::nanoseconds() const {
  constexpr double kByte = 0.0125;
  const double keys = static_cast<double>(shape_.keys), dim = static_cast<double>(shape_.dim);
  const double score = softcap_ > 0.0f ? 1.5 : 0.72;
  const double row = 110.0 + 1.3 * dim + keys * (score + 0.011 * dim);
  const double read = keys * dim * 2 * static_cast<double>(kept_bytes_) * kByte;
  return std::max(static_cast<double>(shape_.batch * shape_.heads * shape_.rows) * row,
                  static_cast<double>(shape_.batch * shape_.kv_heads) * read);
}

void AttentionCore::attend_all(const AttentionHeads& of) const {
  const int64_t pairs = shape_.batch * shape_.kv_heads;
  if (pairs == 0 || shape_.rows == 0 || shape_.heads == 0) return;
  const int64_t parts = threads_worth(Threads::kPool, nanoseconds());
  // Parts of the rows repeat the work on the keys: only where there are too few heads.
  const int64_t row_parts = parts <= pairs ? 1 : std::min(shape_.rows, ceil_div(parts, pairs));
  const int64_t items = pairs * row_parts;
  const int64_t tasks = std::min(parts, items), kv_heads = shape_.kv_heads;
  run_tasks(tasks, [&](int64_t part) {
    const int64_t last = items * (part + 1) / tasks;
    Fetch nothing;
    for (int64_t item = items * part / tasks; item < last;) {
      const int64_t pair = item / row_parts, piece = item % row_parts;
      const int64_t b = pair / kv_heads, kv_head = pair % kv_heads;
      // Heads of a sequence together, where their rows are not parted.
      const int64_t count = row_parts > 1 ? 1 : std::min(kv_heads - kv_head, last - item);
      attend(of, b, kv_head, kv_head + count, shape_.rows * piece / row_parts,
             shape_.rows * (piece + 1) / row_parts, nothing);
      item += count;
    }
  });
}

}  // namespace dynquant
