#include "pack.h"

#include <string.h>

#include "layout.h"

namespace dynquant {
void pack_header(int8_t* packed, int64_t n, int64_t k) {
  const PackedHeader header{kPackedMagic, kLayoutVersion, n, k};
  memset(packed, 0, kHeaderBytes);
  const int64_t padding = panels_of(n) * kPanelColumns - n;
  memset(packed + packed_bytes(n, k) - padding, 0, static_cast<size_t>(padding));
  memcpy(packed, &header, sizeof header);
}

void pack_panel(const int8_t* weight, int64_t stride, int64_t n, int64_t k, int64_t p,
                int8_t* packed) {
  int8_t* panel = packed + kHeaderBytes + p * panel_bytes(k);
  memset(panel, 0, static_cast<size_t>(panel_bytes(k)));
  int8_t* groups = panel + kPanelColumns * kGroup;
  for (int64_t c = 0; c < kPanelColumns && p * kPanelColumns + c < n; ++c) {
    const int8_t* row = weight + (p * kPanelColumns + c) * stride;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += row[i];
    memcpy(panel + c * kGroup, &sum, sizeof sum);
    int8_t* column = groups + c * kGroup;
    const int64_t whole = k / kGroup;
    for (int64_t g = 0; g < whole; ++g) {
      memcpy(column + g * kPanelColumns * kGroup, row + g * kGroup, kGroup);
    }
    if (whole * kGroup == k) continue;
    memcpy(column + whole * kPanelColumns * kGroup, row + whole * kGroup,
           static_cast<size_t>(k % kGroup));
  }
}

void unpack_row(const int8_t* packed, int64_t k, int64_t row, int8_t* out) {
  const int8_t* bytes = packed + kHeaderBytes + row / kPanelColumns * panel_bytes(k) +
                        (kPanelColumns + row % kPanelColumns) * kGroup;
  const int64_t whole = k / kGroup;
  for (int64_t g = 0; g < whole; ++g) {
    memcpy(out + g * kGroup, bytes + g * kPanelColumns * kGroup, kGroup);
  }
  if (whole * kGroup == k) return;
  memcpy(out + whole * kGroup, bytes + whole * kPanelColumns * kGroup,
         static_cast<size_t>(k % kGroup));
}

}  // namespace dynquant
