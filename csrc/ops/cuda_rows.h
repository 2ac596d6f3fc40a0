// Rows and values for each row, as the CUDA kernels take them.
#pragma once

#include "../cuda/args.h"
#include "tensors.h"

namespace dynquant {

inline RowsArgs rows_args(const Rows& rows) {
  check(rows.m <= INT32_MAX, "there are ", rows.m, " rows; CUDA kernels take ", INT32_MAX,
        " at most");
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % 16 == 0;
  return {rows.data, rows.stride, rows.m, rows.k, aligned};
}

template <class T>
RowValues<T> row_values(const PerRow& values) {
  return {static_cast<const T*>(values.data), static_cast<int>(values.step)};
}

}  // namespace dynquant
