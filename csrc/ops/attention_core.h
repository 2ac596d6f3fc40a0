// Scores, softmax and values of attention, one (sequence, key-value head) after the other.
#pragma once

#include <optional>
#include <vector>

#include "added.h"
#include "block.h"
#include "fetch.h"

namespace dynquant {

// Vectors of a head: [B, rows, heads, D], D next to each other. Strides are in bytes.
struct Heads {
  char* data;
  int64_t batch_stride, row_stride, head_stride;

  char* at(int64_t b, int64_t row, int64_t head) const {
    return data + b * batch_stride + row * row_stride + head * head_stride;
  }
};

// The vectors of an attention. `out` may not be one of the others.
struct AttentionHeads {
  Heads query, key, value, out;
  Heads key_scale = {}, value_scale = {};  // one value for each vector, where these are in int8
  bool is_far = false;                     // key and value come from memory
};

// Vectors of some heads in bytes, with the scale of each, and where they are asymmetric the zero
// point.
struct QuantizedHeads {
  int64_t q_stride;      // bytes between heads
  int64_t value_stride;  // between the scales of heads, and their zero points
  uint8_t* q;
  float* scale;
  int32_t* zero_point;

  uint8_t* bytes_of(int64_t head) const { return q + head * q_stride; }
  float* scales_of(int64_t head) const { return scale + head * value_stride; }
  int32_t* zero_points_of(int64_t head) const { return zero_point + head * value_stride; }
};

struct AttentionShape {
  int64_t batch, rows, keys, heads, kv_heads, dim;
};

class AttentionCore {
 public:
  // `dtype` is that of query and output, `kept_dtype` that of key and value, which may be int8
  // where these are not quantized here.
  AttentionCore(const Kernels& kernels, Dtype dtype, Dtype kept_dtype, const AttentionShape& shape,
                const std::optional<Tensor>& mask, const std::optional<Tensor>& position_bias,
                bool is_causal, std::optional<double> scale, bool integers);

  // Everything of the key-value heads [kv_begin, kv_end) of a sequence, for the rows [begin, end)
  // of the queries, in the calling thread. What comes next is fetched meanwhile, some with each row
  // of a head.
  void attend(const AttentionHeads& of, int64_t b, int64_t kv_begin, int64_t kv_end, int64_t begin,
              int64_t end, Fetch& fetch) const;

  // All of it, on all threads.
  void attend_all(const AttentionHeads& of) const;

  // What products are multiplied by.
  float scale() const { return scale_; }
  double nanoseconds() const;  // on one thread

  // To the scores of every head from now on: rows [L, S] in fp32, so many values apart.
  void add_rows(const float* rows, int64_t stride) { added_[0].emplace(rows, stride); }

  // From now on a product s becomes softcap * tanh(s * scale / softcap), before anything is added.
  void cap_scores(double softcap);

  // To the softmax of each row from now on: one more score, that of its head, for a value of zeros.
  void add_sinks(const Tensor& sinks);

  // Whether `rows` of the queries go by attend_few.
  bool are_few(int64_t rows) const { return !integers_ && rows < kStripsFrom; }

 private:
  struct Scored;
  struct Memory;
  struct Place;

  static constexpr int64_t kScoreBytes = 56 * 1024;  // of a block: they wait near the L1 cache
  static constexpr int64_t kRowsTogether = 8;        // of scores, where they are not alike
  static constexpr int64_t kWholeRows = 12;          // that tiles and score rows divide
  // Rows in floats: for fewer, laying out keys and values takes longer than it spares.
  static constexpr int64_t kStripsFrom = 48;

  // Rows [begin, end) of `heads` heads.
  void quantize(const Heads& from, Dtype dtype, int64_t b, int64_t first_head, int64_t heads,
                int64_t begin, int64_t end, bool symmetric, const QuantizedHeads& to) const;
  // Key and value of a quantized key-value head, as weights.
  void pack(Memory& memory, int64_t kv_head) const;
  // Whether a block reads the values of its own keys alone. Panels of the values are as long as
  // there are keys: of a single one less may be read.
  bool reads_fewer_keys() const { return causal_ && shape_.dim <= kPanelColumns; }
  // Column sums of the values of the first `keys` keys, where products need them.
  void sum_values(const Memory& memory, int64_t keys) const;
  // Key and value of a key-value head in strips.
  void lay_strips(const AttentionHeads& of, int64_t b, int64_t kv_head, Memory& memory) const;
  StagedRows quantize_scores(const Product& product, const Memory& memory, int64_t m,
                             int64_t k) const;
  void score(Scored& scored, const float* value_scale, int64_t b, int64_t head, int64_t begin,
             int64_t end, int64_t keys, int64_t filled) const;
  void cap(float* scores, int64_t n) const;
  // What products, capped or not, are multiplied by before anything is added.
  float factor() const { return softcap_ > 0.0f ? softcap_ : scale_; }
  void add(const Added& added, Scored& scored, int i, int64_t b, int64_t head, int64_t first,
           int64_t last, ScoresArgs& to) const;
  // Whether a mask, and nothing else, may hide the last keys.
  bool hides_keys() const {
    return !causal_ && added_[1].has_value() && added_[1]->is_bool() && !added_[0].has_value();
  }
  bool sees_fewer_keys() const { return causal_ || hides_keys(); }
  int64_t keys_seen(const Memory& memory, int64_t b, const Place& place, int64_t begin,
                    int64_t end) const;
  void attend_rows(const AttentionHeads& of, int64_t b, const Place& place, int64_t begin,
                   int64_t end, Memory& memory, Fetch& fetch) const;
  double magnitude(const float* values, int64_t count) const;  // greatest; NaN if there is one
  // attend, for few rows in floats.
  void attend_few(const AttentionHeads& of, int64_t b, int64_t kv_begin, int64_t kv_end,
                  int64_t begin, int64_t end, Fetch& fetch) const;
  // Rows [begin, end) of a head, widened.
  void widen(const Heads& query, int64_t b, int64_t head, int64_t begin, int64_t end,
             float* to) const;
  // Results, `stride` values apart, each divided by its sum, to rows [begin, end) of a head.
  void divide(const float* results, int64_t stride, const float* sums, const Heads& out, int64_t b,
              int64_t head, int64_t begin, int64_t end, Fetch& fetch) const;
  // The scales of a head's keys and values, where these are in int8.
  void read_scales(const AttentionHeads& of, int64_t b, int64_t kv_head, Scored& to) const;
  // The products of m rows of queries and the keys of a head, of which `to` has the scales.
  void multiply_keys(const float* queries, int64_t m, const Heads& key, int64_t b, int64_t kv_head,
                     int64_t keys, const Scored& to) const;
  // Their scales, where keys are in int8.
  void scale_keys(const Scored& to, int64_t m, int64_t keys) const;

  const Kernels& kernels_;
  const Dtype dtype_, kept_dtype_;
  const int64_t kept_bytes_;
  const AttentionShape shape_;
  std::optional<Added> added_[2];  // in this order: position_bias, mask
  const bool causal_, integers_;
  float scale_;
  float softcap_ = 0.0f;      // 0 for none
  std::vector<float> sinks_;  // one for each head of the query, or none
};

// Rows of scores, what is known of each, and the rows that are added to them.
struct AttentionCore::Scored {
  int64_t stride;  // values between rows
  float *scores, *sums;
  Range* ranges;
  float* added[2];
  const char* added_from[2] = {nullptr, nullptr};
  // Of a head's keys and values in int8, next to each other; else null.
  const float *key_scale, *value_scale;
  bool has_finite_scales;  // of the values, known where rows are causal
  float* gathered[2];      // room for them
};

}  // namespace dynquant
