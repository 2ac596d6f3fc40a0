// The epilogue of a block of sums that a matrix unit has left in memory, a row at a time: it goes
// between the products of the next block, where the vector units have nothing else to do. That made
// the whole 1.1 to 1.6 times as fast as an epilogue after each block.
#pragma once

#include "epilogue.inl.h"

namespace dynquant {
namespace {

// A finished block that waits for its epilogue. Before the first one: no rows, and columns that can
// be read.
template <class Out, int Columns>
struct Pending {
  static constexpr int32_t kNoSums[Columns] = {};
  static constexpr TileOut<Out> kNowhere = {nullptr,        nullptr, kNoSums, kNoBias.values,
                                            kNoBias.values, nullptr, 0,       false};

  const int32_t* sums = kNoSums;          // [rows, Columns]
  const TileOut<Out>* panel = &kNowhere;  // of all rows
  int64_t row = 0, column = 0;            // where it begins there
  int64_t columns = Columns;              // beyond them, the output ends
  int rows = 0;
};

// What is left of it, with all that its columns need in registers. To be kept in a variable of a
// function: the instructions of the unit may touch memory, as far as the compiler knows.
template <class Isa, bool Pairs, int Columns, class Out>
class PendingRows {
 public:
  static constexpr int kTogether = Pairs ? 2 : 1;

  // Member by member: a copy of all of `panel` would be read by registers of 64 bytes, which wait
  // for the stores that have just written it in smaller ones.
  inline explicit PendingRows(const Pending<Out, Columns>& pending)
      : sums_(pending.sums),
        zero_point_(pending.panel->zero_point + pending.row),
        out_stride_(pending.panel->out_stride),
        columns_(pending.columns),
        left_(pending.rows) {
    const TileOut<Out>& panel = *pending.panel;
    const int64_t out_row = pending.row / kTogether;
    out_ = panel.out + out_row * out_stride_ + pending.column;
    if constexpr (!kIsInt32<Out>) scale_ = panel.scale + out_row;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = pending.column + v * Isa::kLanes;
      column_sums_[v] = Isa::load_int(panel.column_sums + c);
      if constexpr (!kIsInt32<Out>) scaled_[v] = {panel.weight_scale + c, panel.bias + c};
    }
  }

  // Whether the output has room for all its columns; else finish_next is not for its rows.
  inline bool whole() const { return columns_ >= Columns; }
  inline int left() const { return left_; }

  // Passes over rows that are finished, until `rows` are left.
  inline void leave(int rows) {
    while (left_ > rows) next();
  }

  inline void finish_next() {
    if (left_ <= 0) return;
    finish_to(out_);
    next();
  }

  inline void finish_all() {
    if (whole()) {
      while (left_ > 0) finish_next();
    }
    for (; left_ > 0; next()) {
      Out result[Columns];
      finish_to(result);
      memcpy(out_, result, static_cast<size_t>(columns_) * sizeof(Out));
    }
  }

 private:
  static constexpr int kVectors = Columns / Isa::kLanes;
  static_assert(Columns % Isa::kLanes == 0);

  inline void finish_to(Out* out) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto corrected = [&](int r) {
        const typename Isa::Int acc = Isa::load_int(sums_ + r * Columns + v * Isa::kLanes);
        return corrected_sums<Isa>(acc, zero_point_[r], column_sums_[v]);
      };
      if constexpr (kIsInt32<Out>) {
        Isa::store_int(out + v * Isa::kLanes, corrected(0));
      } else {
        const typename Isa::Float sum =
            Pairs ? joined<Isa>(corrected(0), corrected(1)) : Isa::to_float(corrected(0));
        Isa::store(out + v * Isa::kLanes, scaled_[v](sum, *scale_));
      }
    }
  }

  inline void next() {
    sums_ += kTogether * Columns;
    zero_point_ += kTogether;
    if constexpr (!kIsInt32<Out>) ++scale_;
    out_ += out_stride_;
    left_ -= kTogether;
  }

  typename Isa::Int column_sums_[kVectors];
  ColumnScaling<Isa> scaled_[kVectors];
  const int32_t* sums_;
  const int32_t* zero_point_;
  const float* scale_ = nullptr;
  Out* out_;
  const int64_t out_stride_, columns_;
  int left_;
};

}  // namespace
}  // namespace dynquant
