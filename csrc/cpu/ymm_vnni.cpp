// VPDPBUSD on 256 bits. Built twice: as AVX-VNNI (VEX encoding), and as the EVEX encoding of the
// same instruction, which processors with AVX512-VNNI but without AVX-VNNI run.
#include "sets.h"
#include "table.inl.h"
#include "ymm.h"

namespace dynquant {
namespace {

struct YmmVnni : Ymm {
  static constexpr int kTileRows = 6;
  static constexpr int kLongTileRows = kTileRows;
  static constexpr int kTemporaries = 0;
  static constexpr int kGroupBytes = kGroup;
  static constexpr int kOffset = 0;
  static constexpr bool kKeepsWeights = true;
  static constexpr Reading kReading = {8, kTileRows, 4096, false};
  // Measured as avx512vnni_ymm on an Intel Cascade Lake of 2.5 GHz, weights in the L2 cache.
  static constexpr Costs kCosts = {0.0065, 0.016, 0.23, 31.0};
  static constexpr Costs kHalfCosts = {0.022, 0.022, 0.0, 6.0};
  using Weights = __m256i;
  using Activation = __m256i;

  static inline int32_t stage(const uint8_t* q, int64_t groups, uint8_t* staged) {
    memcpy(staged, q, static_cast<size_t>(groups * kGroup));
    return 0;
  }
  static inline Weights load_weights(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static inline Activation load_activation(const uint8_t* p) { return broadcast(p); }
  static inline Weights keep(Weights w) {
    asm volatile("" : "+x"(w));
    return w;
  }
  static inline Int dot(Int acc, Activation a, Weights w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, a, w);
#else
    return _mm256_dpbusd_epi32(acc, a, w);
#endif
  }
};

}  // namespace

#if defined(__AVXVNNI__)
const Kernels* avxvnni_kernels() {
  static constexpr Kernels table = table_of<YmmVnni>("avxvnni");
  return &table;
}
#else
const Kernels* avx512vnni_ymm_kernels() {
  static constexpr Kernels table = table_of<YmmVnni>("avx512vnni_ymm");
  return &table;
}
#endif

}  // namespace dynquant
