// The set `amx`: AVX512-VNNI, and a product on tiles beside its own. And whether this process may
// use it: what the processor has, what the system saves, the permission
// that Linux asks a process to request, and a product that proves it.
#include "sets.h"

#if defined(__x86_64__)
#include "layout.h"
#include "staged.h"

namespace dynquant {

// Here, in code for any machine: who looks for a name asks every set for its table.
const Kernels* amx_kernels() {
  static const Kernels table = with_tiles("amx", *avx512vnni_kernels(), *amx_tile_kernels());
  return &table;
}

// A product of blocks of both forms, with a tail of K and the extreme values of both operands.
bool amx_product_is_right() {
  constexpr int64_t kRows = 35, kDepth = 70, kColumns = 64;
  const Product& product = amx_tile_kernels()->product;
  const int64_t groups = groups_of(kDepth), stride = staged_stride(product.layout, groups);
  alignas(64) static uint8_t staged[3 * 16 * 128];
  alignas(64) static int8_t panel[panel_bytes(kDepth)];
  static int32_t sums[kRows * kColumns];
  int32_t zero_points[kRows] = {};
  const auto activation = [](int64_t m, int64_t k) {
    return static_cast<uint8_t>(m == 0 ? 255 : m * 37 + k * 11);
  };
  const auto weight = [](int64_t n, int64_t k) {
    return static_cast<int8_t>(n == 0 ? -128 : (n * 29 + k * 7) % 255 - 127);
  };
  for (int64_t m = 0; m < kRows; ++m) {
    uint8_t row[kDepth];
    for (int64_t k = 0; k < kDepth; ++k) row[k] = activation(m, k);
    product.stage(row, kDepth, 0, staged + staged_offset(product.layout, stride, m));
  }
  for (int64_t n = 0; n < kColumns; ++n) {
    int8_t* group = panel + kPanelColumns * kGroup + n * kGroup;
    for (int64_t k = 0; k < kDepth; ++k) {
      group[k / kGroup * kPanelColumns * kGroup + k % kGroup] = weight(n, k);
    }
  }
  GemmArgs a = {};
  a.staged = staged;
  a.staged_stride = stride;
  a.zero_point = zero_points;
  a.m = kRows;
  a.panels = panel;
  a.groups = groups;
  a.n_end = kColumns;
  a.epilogue.out = sums;
  a.epilogue.out_dtype = Dtype::i32;
  a.epilogue.out_stride = kColumns;
  product.gemm(a);
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t n = 0; n < kColumns; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < kDepth; ++k) sum += int32_t{activation(m, k)} * weight(n, k);
      if (sums[m * kColumns + n] != sum) return false;
    }
  }
  return true;
}

}  // namespace dynquant

#if defined(__linux__)
#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu_id.h"

namespace dynquant {
namespace {

bool has_instructions() {
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  const CpuId features(7, 0);
  return (features.d & kAmxTile) != 0 && (features.d & kAmxInt8) != 0;
}

// Palette 1 with eight tiles of 16 rows of 64 bytes, the one that tiles.inl.h is written for.
bool has_palette() {
  if (CpuId(0x1D, 0).a < 1) return false;
  const CpuId palette(0x1D, 1);
  const unsigned tile_bytes = palette.a >> 16, row_bytes = palette.b & 0xFFFF;
  const unsigned tiles = palette.b >> 16, rows = palette.c & 0xFFFF;
  return tile_bytes == 1024 && row_bytes == 64 && tiles >= 8 && rows >= 16;
}

bool system_saves_tiles() {
  constexpr unsigned kOsxsave = 1u << 27;
  constexpr uint32_t kTileState = 3u << 17;
  if ((CpuId(1, 0).c & kOsxsave) == 0) return false;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState;
}

// Null, or why not. What is granted holds for all threads of the process, later ones included, and
// for what it forks.
const char* request_permission() {
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    if (errno == ENOSPC)
      return "a thread's alternate signal stack is too small to save AMX's tiles";
    return errno == EINVAL || errno == EOPNOTSUPP
               ? "the operating system is too old to give AMX to a process"
               : "the operating system refuses AMX to this process (a sandbox may forbid the call)";
  }
  uint64_t granted = 0;
  if (syscall(SYS_arch_prctl, kGetPermission, &granted) != 0 || (granted >> kTileData & 1) == 0) {
    return "the operating system did not give AMX to this process";
  }
  return nullptr;
}

const char* find_missing() {
  if (const char* reason = avx512vnni_missing()) return reason;
  if (!has_instructions()) return "the processor has no AMX (TILE, INT8)";
  if (!has_palette()) return "the processor's AMX has other tiles than 16 rows of 64 bytes";
  if (!system_saves_tiles()) return "the operating system does not save AMX's tiles";
  if (const char* reason = request_permission()) return reason;
  return amx_product_is_right() ? nullptr : "AMX gives a wrong product here";
}

}  // namespace

const char* amx_missing() {
  static const char* const reason = find_missing();
  return reason;
}

}  // namespace dynquant
#else
namespace dynquant {
const char* amx_missing() { return "AMX is asked for on Linux alone"; }
}  // namespace dynquant
#endif
#endif
