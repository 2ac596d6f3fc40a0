// AVX2 without VNNI. VPMADDUBSW would saturate, so bytes are widened to 16 bits and VPMADDWD
// multiplies: exact, at half VNNI's rate.
//
// A lane's four weights are split into their odd and even bytes by shifts, which keeps the packed
// layout; the activations are widened once when they are staged, in the same split.
#include "sets.h"
#include "table.inl.h"
#include "ymm.h"

namespace dynquant {
namespace {

struct Avx2 : Ymm {
  static constexpr int kTileRows = 6;
  static constexpr int kLongTileRows = kTileRows;
  // Five more than there are: widening is what VNNI does not need and more rows share it, and the
  // few sums that live on the stack cost nothing, because an addition waits for no other one. Tiles
  // that fit are 3% slower.
  static constexpr int kRegisters = 21;
  static constexpr int kParts = 2;
  static constexpr int kTemporaries = 1;
  static constexpr int kGroupBytes = 8;
  // Measured on an Intel Cascade Lake of 2.5 GHz, weights in the L2 cache.
  static constexpr Costs kCosts = {0.0203, 0.034, 0.32, 34.0};
  static constexpr Costs kHalfCosts = {0.022, 0.022, 0.0, 6.0};
  struct Weights {
    __m256i even, odd;
  };
  using Activation = __m256i;

  // k0 k1 k2 k3 -> (k0, k2), (k1, k3) as 16-bit pairs.
  static inline void stage(const uint8_t* q, int64_t groups, uint8_t* staged) {
    for (int64_t g = 0; g < groups; ++g) {
      uint32_t bytes;
      memcpy(&bytes, q + g * kGroup, sizeof bytes);
      const uint64_t pairs = (bytes & 0x00FF00FFu) | (uint64_t{(bytes >> 8) & 0x00FF00FFu} << 32);
      memcpy(staged + g * kGroupBytes, &pairs, sizeof pairs);
    }
  }
  static inline Weights load_weights(const int8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  static inline Activation load_activation(const uint8_t* p, int part) {
    int32_t pair;
    memcpy(&pair, p + part * 4, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  static inline Weights keep(Weights w) {
    asm volatile("" : "+x"(w.even), "+x"(w.odd));
    return w;
  }
  static inline Int dot(Int acc, Activation a, Weights w, int part) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, part == 0 ? w.even : w.odd));
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels table = table_of<Avx2>("avx2");
  return &table;
}

}  // namespace dynquant
