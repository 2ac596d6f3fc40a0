// A matrix unit in plain C++, for tiles.inl.h where no processor has one. It refuses what the real
// one would: tiles that are not configured, and operands of sizes that do not match. Each thread
// has one.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace dynquant {
namespace {

struct EmulatedTiles {
  struct Tile {
    int rows;
    uint8_t bytes[16][64];
  };
  static inline thread_local Tile tiles[8] = {};
  static inline thread_local bool configured = false;

  static void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
  }
  static Tile& used(int t) {
    require(configured && tiles[t].rows > 0, "a tile is used that is not configured");
    return tiles[t];
  }

  static void configure(const int (&rows)[8]) {
    configured = true;
    for (int t = 0; t < 8; ++t) {
      require(rows[t] >= 0 && rows[t] <= 16, "a tile has 16 rows at most");
      tiles[t].rows = rows[t];
      memset(tiles[t].bytes, 0, sizeof tiles[t].bytes);
    }
  }
  static void release() {
    require(configured, "released without a configuration");
    configured = false;
  }
  template <int T>
  static void zero() {
    memset(used(T).bytes, 0, sizeof tiles[T].bytes);
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
    Tile& tile = used(T);
    for (int r = 0; r < tile.rows; ++r) {
      memcpy(tile.bytes[r], static_cast<const uint8_t*>(p) + r * stride, 64);
    }
  }
  template <int T>
  static void load_passing(const void* p, int64_t stride) {
    load<T>(p, stride);
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    const Tile& tile = used(T);
    for (int r = 0; r < tile.rows; ++r) {
      memcpy(static_cast<uint8_t*>(p) + r * stride, tile.bytes[r], 64);
    }
  }
  template <int C, int A, int B>
  static void dot() {
    Tile& sums = used(C);
    const Tile &a = used(A), &b = used(B);
    require(sums.rows == a.rows && b.rows == 16, "the operands' sizes do not match");
    for (int m = 0; m < sums.rows; ++m) {
      int32_t row[16];
      memcpy(row, sums.bytes[m], sizeof row);
      for (int k = 0; k < 64; ++k) {
        for (int n = 0; n < 16; ++n) {
          const int8_t weight = static_cast<int8_t>(b.bytes[k / 4][n * 4 + k % 4]);
          row[n] += int32_t{a.bytes[m][k]} * weight;
        }
      }
      memcpy(sums.bytes[m], row, sizeof row);
    }
  }
};

}  // namespace
}  // namespace dynquant
