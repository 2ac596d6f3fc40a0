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

// Beside those of AVX512-VNNI, measured on an Emerald Rapids: they tell when the tiles are faster,
// which 3 or 4 rows of many values are, and no rows of 64 values.
constexpr Costs kCosts = {0.00082, 0.0115, 0.15, 22.0, 0.03};
constexpr double kStart = 360.0;  // to configure the tiles, fill them, and release them

}  // namespace

const TileKernels* amx_tile_kernels() {
  static constexpr TileKernels kernels = {tile_product<Zmm, AmxTiles>(kCosts), kStart,
                                          &peak_tiles<AmxTiles>};
  return &kernels;
}

}  // namespace dynquant
