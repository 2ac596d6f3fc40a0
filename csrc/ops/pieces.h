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
    at_ = scratch(static_cast<size_t>(total(bytes)), purpose);
  }
  // The same of a piece of another one, which holds so many bytes in total.
  explicit Pieces(uint8_t* piece) : at_(piece) {}
  static int64_t total(std::initializer_list<int64_t> bytes) {
    int64_t sum = 0;
    for (int64_t piece : bytes) sum += rounded(piece);
    return sum;
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
