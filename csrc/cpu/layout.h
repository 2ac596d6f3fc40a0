// The packed weight layout: one formula, the same for every instruction set.
//
// A packed weight W[N, K] is one block of bytes:
//
//     header   64 bytes: magic, layout version, N, K
//     panel 0  columns (output channels) 0..63
//     panel 1  columns 64..127, and so on; the last panel is filled up with zeros
//     padding  one byte for each column that fills up the last panel, so that the length alone
//              tells N to a tracer that sees shapes and no data
//
// and a panel is
//
//     64 int32 column sums, sum over k of W[n, k]
//     group 0  for each of the 64 columns the four bytes k = 0..3
//     group 1  for each of the 64 columns the four bytes k = 4..7, and so on; zeros fill up K
//
// Four consecutive k of one column are one 32-bit lane, which is what VPDPBUSD multiplies and adds
// in one step; 64 columns are four 512-bit or eight 256-bit registers, and reading a panel from
// front to back is one forward stream, which is what a memory-bound product wants. The sums lie in
// front of their panel, so that correcting for the zero point costs no second stream, and they make
// the distance between panels an odd multiple of 256 bytes for the usual K, which keeps panels from
// competing for the same cache sets.
#pragma once

#include <stdint.h>

namespace dynquant {

constexpr uint32_t kPackedMagic = 0x31715944;  // "DYq1"
constexpr uint32_t kLayoutVersion = 1;
constexpr int64_t kHeaderBytes = 64;
constexpr int64_t kPanelColumns = 64;
constexpr int64_t kGroup = 4;
constexpr int64_t kMaxK = 65536;  // 255 * 127 * 65536 is the largest product sum that int32 holds
constexpr int64_t kMaxN = int64_t{1} << 31;

struct PackedHeader {
  uint32_t magic;
  uint32_t version;
  int64_t n;
  int64_t k;
};

constexpr int64_t kLine = 64;  // bytes of a line of the caches

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t groups_of(int64_t k) { return ceil_div(k, kGroup); }
constexpr int64_t panels_of(int64_t n) { return ceil_div(n, kPanelColumns); }
constexpr int64_t panel_bytes(int64_t k) { return kPanelColumns * kGroup * (1 + groups_of(k)); }
constexpr int64_t packed_bytes(int64_t n, int64_t k) {
  return kHeaderBytes + panels_of(n) * panel_bytes(k) + panels_of(n) * kPanelColumns - n;
}

// N of a packed weight of that length; meaningless where no N gives that length.
constexpr int64_t columns_of(int64_t bytes, int64_t k) {
  const int64_t body = bytes - kHeaderBytes;
  return body / panel_bytes(k) * kPanelColumns - body % (kPanelColumns * kGroup);
}

}  // namespace dynquant
