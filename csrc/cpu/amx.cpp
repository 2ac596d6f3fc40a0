// The products of AMX: VPDPBUSD keeps those that cost less there, and all else (amx_set.cpp).
#include "sets.h"
#include "tiles.inl.h"
#include "zmm.h"

namespace dynquant {
namespace {

// Not the compiler's own functions: those of g++ 12 do not say that they touch memory, and of the
// configuration only its first bytes.
struct AmxTiles {
  static inline void configure(const int (&rows)[8]) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = rows[t] == 0 ? 0 : 64;
      config.rows[t] = static_cast<uint8_t>(rows[t]);
    }
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static inline void release() { asm volatile("tilerelease" : : : "memory"); }
  template <int T>
  static inline void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
  }
  template <int T>
  static inline void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static inline void load_passing(const void* p, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static inline void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static inline void dot() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
  }
};

// Measured side by side on an Emerald Rapids: they tell when the tiles are faster, which 4 rows of
// 768x768 are, and few rows of 64 values are not.
constexpr Costs kCosts = {0.00037, 0.0085, 0.12, 9.5, 0.03};
constexpr Costs kVectorCosts = {0.0029, 0.0085, 0.11, 5.9};
constexpr double kStart = 170.0;  // to configure the tiles, fill them, and release them

}  // namespace

const TileKernels* amx_tile_kernels() {
  static constexpr TileKernels kernels = {tile_product<Zmm, AmxTiles>(kCosts), kStart, kVectorCosts,
                                          &peak_tiles<AmxTiles>};
  return &kernels;
}

}  // namespace dynquant
