// VPDPBUSD on 512 bits: 24 registers of sums, four of weights, one broadcast activation.
#include "sets.h"
#include "table.inl.h"
#include "zmm.h"

namespace dynquant {
namespace {

struct Avx512Vnni : Zmm {
  static constexpr int kTileRows = 6;
  static constexpr int kLongTileRows = 8;
  static constexpr int kTemporaries = 0;
  static constexpr int kGroupBytes = kGroup;
  static constexpr bool kKeepsWeights = true;
  static constexpr Reading kReading = {8, kTileRows, 4096, false};
  static constexpr Costs kCosts = {0.0043, 0.011, 0.13, 6.0};
  static constexpr Costs kHalfCosts = {0.022, 0.022, 0.0, 6.0};
  using Weights = __m512i;
  using Activation = __m512i;

  static inline int32_t stage(const uint8_t* q, int64_t groups, uint8_t* staged) {
    memcpy(staged, q, static_cast<size_t>(groups * kGroup));
    return 0;
  }
  static inline Weights load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
  static inline Activation load_activation(const uint8_t* p) {
    int32_t group;
    memcpy(&group, p, sizeof group);
    return _mm512_set1_epi32(group);
  }
  static inline Weights keep(Weights w) {
    asm volatile("" : "+v"(w));
    return w;
  }
  static inline Int dot(Int acc, Activation a, Weights w) { return _mm512_dpbusd_epi32(acc, a, w); }
};

}  // namespace

const Kernels* avx512vnni_kernels() {
  static constexpr Kernels table = table_of<Avx512Vnni>("avx512vnni");
  return &table;
}

}  // namespace dynquant
