#include "indices.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace dynquant {
namespace {

template <class T>
void check_in_table(const T* indices, int64_t count, int64_t rows, const char* name) {
  std::atomic<int64_t> wrong{-1};
  run_range(count, sizeof(T), [&](int64_t begin, int64_t end) {
    T least = 0, most = 0;
    for (int64_t i = begin; i < end; ++i) {
      least = std::min(least, indices[i]);
      most = std::max(most, indices[i]);
    }
    if (least >= 0 && most < rows) return;
    for (int64_t i = begin; i < end; ++i) {
      if (indices[i] < 0 || indices[i] >= rows) wrong = i;
    }
  });
  const int64_t at = wrong;
  check(at < 0, name, " must lie in [0, ", rows, "), found ",
        at < 0 ? 0 : static_cast<int64_t>(indices[at]), " at position ", at);
}

Tensor checked(const Tensor& indices, const char* name) {
  check_tensor(indices, name, {ScalarType::Long, ScalarType::Int});
  return dense(indices);
}

}  // namespace

Indices::Indices(const Tensor& indices, int64_t rows, const char* name)
    : holder(checked(indices, name)),
      data(holder.const_data_ptr()),
      wide(holder.scalar_type() == ScalarType::Long),
      count(holder.numel()) {
  if (count == 0) return;
  if (wide) {
    check_in_table(static_cast<const int64_t*>(data), count, rows, name);
  } else {
    check_in_table(static_cast<const int32_t*>(data), count, rows, name);
  }
}

}  // namespace dynquant
