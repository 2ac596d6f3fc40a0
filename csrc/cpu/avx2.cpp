// AVX2 without VNNI. VPMADDUBSW adds two products of an unsigned and a signed byte in 16 bits,
// where those of all bytes would saturate. So a byte q is staged as the signed a = q - 128: its
// magnitude, and a mask of ones where a is negative. Then
//
//     |a| * (w ^ mask) = a * w        where a >= 0
//     |a| * (w ^ mask) = a * w + a    where a < 0, because ~w is -w - 1
//
// Two of these fit into 16 bits whatever the bytes are, and what they have too much, the sum of the
// negative a, is one number for the whole row.
#include "sets.h"
#include "table.inl.h"
#include "ymm.h"

namespace dynquant {
namespace {

struct Avx2 : Ymm {
  // 12 registers of sums, one activation's two, ones, and what a product goes through.
  static constexpr int kTileRows = 3;
  static constexpr int kLongTileRows = kTileRows;
  static constexpr int kTemporaries = 3;
  static constexpr int kGroupBytes = 8;
  static constexpr int kOffset = 128;
  // No register is left for weights: each is an operand in memory, once for each row.
  static constexpr bool kKeepsWeights = false;
  static constexpr Reading kReading = {4, 2, 0, true};
  // Measured on an AMD EPYC (Zen 3) of 2.45 GHz, weights in the L2 cache.
  static constexpr Costs kCosts = {0.016, 0.019, 0.28, 28.0};
  static constexpr Costs kHalfCosts = {0.022, 0.022, 0.0, 6.0};
  using Weights = const int8_t*;
  struct Activation {
    __m256i magnitude, mask;
  };

  // Of each four k the magnitudes, then the masks. Gives the sum of the negative ones.
  static inline int32_t stage(const uint8_t* q, int64_t groups, uint8_t* staged) {
    int64_t g = 0;
    __m256i negative = _mm256_setzero_si256();
    for (; g + kLanes <= groups; g += kLanes) {
      const Int bytes = _mm256_loadu_si256(reinterpret_cast<const Int*>(q + g * kGroup));
      negative = _mm256_add_epi64(negative, stage_lanes(bytes, staged + g * kGroupBytes));
    }
    if (g < groups) {
      const size_t left = static_cast<size_t>(groups - g);
      uint8_t bytes[kLanes * kGroup], result[kLanes * kGroupBytes];
      memset(bytes, kOffset, sizeof bytes);
      memcpy(bytes, q + g * kGroup, left * kGroup);
      const Int last = _mm256_loadu_si256(reinterpret_cast<const Int*>(bytes));
      negative = _mm256_add_epi64(negative, stage_lanes(last, result));
      memcpy(staged + g * kGroupBytes, result, left * kGroupBytes);
    }
    int64_t sums[4];
    _mm256_storeu_si256(reinterpret_cast<Int*>(sums), negative);
    return static_cast<int32_t>(-(sums[0] + sums[1] + sums[2] + sums[3]));
  }
  static inline Weights load_weights(const int8_t* p) { return p; }
  static inline Activation load_activation(const uint8_t* p) {
    return {broadcast(p), broadcast(p + kGroup)};
  }
  static inline Weights keep(Weights w) {
    asm volatile("" : "+r"(w));
    return w;
  }
  static inline Int dot(Int acc, const Activation& a, Weights w) {
    // The compiler would load the weights into registers, and spill what has none then.
    Int signed_weights;
    asm("vpxor %1, %2, %0"
        : "=x"(signed_weights)
        : "m"(*reinterpret_cast<const Bytes*>(w)), "x"(a.mask));
    const Int pairs = _mm256_maddubs_epi16(a.magnitude, signed_weights);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

 private:
  struct Bytes {
    int8_t v[kLanes * kGroup];
  };

  // Gives the sums of the negative ones' magnitudes.
  static inline Int stage_lanes(Int q, uint8_t* staged) {
    const Int a = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
    const Int mask = _mm256_cmpgt_epi8(_mm256_setzero_si256(), a);
    const Int magnitude = _mm256_abs_epi8(a);
    // Unpacking goes by 128 bits.
    const Int low = _mm256_unpacklo_epi32(magnitude, mask);
    const Int high = _mm256_unpackhi_epi32(magnitude, mask);
    Int* to = reinterpret_cast<Int*>(staged);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    return _mm256_sad_epu8(_mm256_and_si256(magnitude, mask), _mm256_setzero_si256());
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels table = table_of<Avx2>("avx2");
  return &table;
}

}  // namespace dynquant
