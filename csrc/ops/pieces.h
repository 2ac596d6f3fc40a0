// A thread's memory, cut into pieces.
#pragma once

#include <initializer_list>

#include "../cpu/layout.h"
#include "scratch.h"

namespace dynquant {

// The calling thread's memory for some purpose, cut into pieces that begin at cache lines.
class Pieces {
 public:
  Pieces(Purpose purpose, std::initializer_list<int64_t> bytes) {
    int64_t total = 0;
    for (int64_t piece : bytes) total += rounded(piece);
    at_ = scratch(static_cast<size_t>(total), purpose);
  }
  template <class T = char>
  T* next(int64_t count) {
    uint8_t* piece = at_;
    at_ += rounded(count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(piece);
  }

 private:
  static int64_t rounded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }
  uint8_t* at_;
};

}  // namespace dynquant
