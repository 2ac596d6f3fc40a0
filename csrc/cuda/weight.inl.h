// Packing and unpacking weights, and bringing given bytes to where the product reads 16 at a time.
#pragma once

#include "args.h"
#include "gpu.h"

namespace dynquant {

// The four bytes from byte `first` of `count`, zeros beyond.
DYNQUANT_DEVICE uint32_t load_word(const uint8_t* bytes, int64_t first, int64_t count) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < count) word |= uint32_t{bytes[first + i]} << (8 * i);
  }
  return word;
}

// Rows of bytes to rows that start at multiples of 16 and are filled up with zeros.
struct StageKernel {
  using Args = StageArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;

  static constexpr int shared_bytes() { return 0; }
  static Grid grid(int64_t m) { return {m, 1}; }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    const uint8_t* q = a.q + Gpu::block_x() * a.stride;
    uint32_t* staged = reinterpret_cast<uint32_t*>(a.staged + Gpu::block_x() * a.staged_stride);
    for (int64_t word = Gpu::thread(); word < a.staged_stride / 4; word += kThreads) {
      staged[word] = load_word(q, 4 * word, a.k);
    }
  }
};

// One block packs one panel: a thread of each of four parties has one column.
struct PackKernel {
  using Args = PackArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  static constexpr int kWidth = static_cast<int>(kPanelColumns);
  static constexpr int kParties = kThreads / kWidth;

  static constexpr int shared_bytes() { return kThreads * static_cast<int>(sizeof(int32_t)); }
  static Grid grid(int64_t n) { return {panels_of(n) > 0 ? panels_of(n) : 1, 1}; }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    if (Gpu::block_x() == 0) write_surroundings<Gpu>(a);
    if (Gpu::block_x() >= panels_of(a.n)) return;
    const int column = Gpu::thread() % kWidth, party = Gpu::thread() / kWidth;
    const int64_t row = Gpu::block_x() * kPanelColumns + column;
    int8_t* panel = a.packed + kHeaderBytes + Gpu::block_x() * panel_bytes(a.k);
    uint32_t* words = reinterpret_cast<uint32_t*>(panel) + kWidth;
    const uint8_t* weight = reinterpret_cast<const uint8_t*>(a.weight) + row * a.stride;
    int32_t sum = 0;
    bool refused = false;
    for (int64_t group = party; group < groups_of(a.k); group += kParties) {
      const uint32_t word = row < a.n ? load_word(weight, group * kGroup, a.k) : 0;
      words[group * kWidth + column] = word;
      sum = Gpu::dot(0x01010101u, word, sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) refused = refused || (word >> (8 * i) & 0xFFu) == 0x80u;
    }
    if (refused) *a.refused = 1;
    int32_t* const sums = reinterpret_cast<int32_t*>(Gpu::shared());
    sums[Gpu::thread()] = sum;
    Gpu::sync();
    if (party != 0) return;
    for (int i = 1; i < kParties; ++i) sum += sums[i * kWidth + column];
    reinterpret_cast<int32_t*>(panel)[column] = sum;
  }

 private:
  // The header and the padding.
  template <class Gpu>
  static DYNQUANT_DEVICE void write_surroundings(const Args& a) {
    if (Gpu::thread() < kHeaderBytes) a.packed[Gpu::thread()] = 0;
    const int64_t padding = panels_of(a.n) * kPanelColumns - a.n;
    if (Gpu::thread() < padding) a.packed[packed_bytes(a.n, a.k) - padding + Gpu::thread()] = 0;
    Gpu::sync();
    if (Gpu::thread() != 0) return;
    *reinterpret_cast<PackedHeader*>(a.packed) = {kPackedMagic, kLayoutVersion, a.n, a.k};
  }
};

constexpr int8_t kNoWeight = -128;  // no symmetric weight is that

// One block unpacks one row.
struct UnpackKernel {
  using Args = UnpackArgs;
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;

  static constexpr int shared_bytes() { return 0; }
  static Grid grid(int64_t n) { return {n, 1}; }

  template <class Gpu>
  static DYNQUANT_DEVICE void run(const Args& a) {
    const int64_t row = Gpu::block_x();
    const bool fits = header_fits(a.packed, a.n, a.k);
    const int8_t* panel = a.packed + kHeaderBytes + row / kPanelColumns * panel_bytes(a.k);
    const int8_t* groups = panel + (kPanelColumns + row % kPanelColumns) * kGroup;
    int8_t* weight = a.weight + row * a.k;
    for (int64_t i = Gpu::thread(); i < a.k; i += kThreads) {
      const int8_t value = groups[i / kGroup * kPanelColumns * kGroup + i % kGroup];
      weight[i] = fits ? value : kNoWeight;
    }
  }
};

}  // namespace dynquant
