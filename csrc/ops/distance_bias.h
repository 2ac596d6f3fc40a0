// What an attention adds to its scores for how far a key lies from a query.
#pragma once

#include <optional>

#include "attention_core.h"
#include "distance_bands.h"

namespace dynquant {

// bias[i, j] = (by_query[i, j] + by_key[j, i]) * scale, in fp32, of one head of one sequence after
// the other, in one thread; by_key's vectors are in the opposite order. Neither term has to be
// there.
class DistanceBias {
 public:
  DistanceBias(const Kernels& kernels, const std::optional<DistanceTerm>& by_query,
               const std::optional<DistanceTerm>& by_key, int64_t dim, float scale, bool integers);

  bool is_none() const { return !by_query_.has_value() && !by_key_.has_value(); }
  // Memory for it, which has to be given before anything is computed.
  int64_t bytes() const { return Pieces::total({query_bytes(), key_bytes()}); }
  void take(uint8_t* memory);
  // For one row and key on AVX512-VNNI, within a third for 32 to 512 rows of heads of 64.
  double nanoseconds() const;

  void begin_head(int64_t head);
  // For that head of a sequence: `rows` rows of as many values as there are keys.
  void compute(int64_t b, int64_t rows, int64_t keys, float* out, int64_t out_stride);

 private:
  int64_t query_bytes() const { return by_query_.has_value() ? by_query_->bytes(1) : 0; }
  int64_t key_bytes() const { return by_key_.has_value() ? by_key_->bytes(by_key_->count()) : 0; }

  std::optional<DistanceBands> by_query_, by_key_;
  const int64_t dim_;
  const float scale_;
  const bool integers_;
};

}  // namespace dynquant
