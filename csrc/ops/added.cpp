#include "added.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/convert.h"

namespace dynquant {

Added::Added(const Tensor& given, const char* name, bool may_be_bool, const int64_t (&shape)[4])
    : holder_(given) {
  if (may_be_bool) {
    check_tensor(given, name,
                 {ScalarType::Bool, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  } else {
    check_float(given, name);
  }
  is_bool_ = given.scalar_type() == ScalarType::Bool;
  if (!is_bool_) dtype_ = check_float(given, name);
  check(given.dim() == 4, name, " must have four dimensions [B, H, L, S], got ", ShapeOf(given));
  const int64_t bytes = static_cast<int64_t>(given.element_size());
  for (int64_t d = 0; d < 4; ++d) {
    check(given.size(d) == shape[d] || given.size(d) == 1, name, " must spread to [", shape[0],
          ", ", shape[1], ", ", shape[2], ", ", shape[3], "], got ", ShapeOf(given));
    strides_[d] = given.size(d) == 1 ? 0 : given.stride(d) * bytes;
  }
  data_ = static_cast<const char*>(given.const_data_ptr());
}

void Added::widen(const Kernels& kernels, const char* row, int64_t n, float* to) const {
  if (is_bool_ && strides_[3] == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = row[i] != 0 ? 0.0f : -INFINITY;  // as vectors
  } else if (is_bool_) {
    for (int64_t i = 0; i < n; ++i) to[i] = row[i * strides_[3]] != 0 ? 0.0f : -INFINITY;
  } else if (strides_[3] == bytes_of(dtype_)) {
    kernels.widen(row, dtype_, n, to);
  } else if (dtype_ == Dtype::f32) {
    widen_strided<float>(row, strides_[3], n, to);
  } else if (dtype_ == Dtype::bf16) {
    widen_strided<Bfloat16>(row, strides_[3], n, to);
  } else {
    widen_strided<Half>(row, strides_[3], n, to);
  }
  std::fill(to + n, to + filled_up(n), 0.0f);
}

int64_t Added::seen(const char* row, int64_t least, int64_t n) const {
  constexpr int64_t kAtOnce = sizeof(uint64_t);
  while (strides_[3] == 1 && n - least >= kAtOnce) {
    uint64_t some;
    std::memcpy(&some, row + n - kAtOnce, sizeof some);
    if (some != 0) break;
    n -= kAtOnce;
  }
  while (n > least && row[(n - 1) * strides_[3]] == 0) --n;
  return n;
}

}  // namespace dynquant
