#include "recurrence.h"

#include <algorithm>

#include "../cpu/convert.h"

namespace dynquant {
namespace {

template <class F>
void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::bf16) return f(Bfloat16());
  if (dtype == Dtype::f16) return f(Half());
  f(float());
}

}  // namespace

std::vector<int64_t> step_starts(const Tensor& x, const std::optional<Tensor>& batch_sizes) {
  std::vector<int64_t> starts = {0};
  if (!batch_sizes.has_value()) {
    check(x.dim() == 3, "x must have three dimensions [T, B, K], got ", ShapeOf(x));
    check(x.size(0) > 0, "expected sequence length to be larger than 0 in x, got ", ShapeOf(x));
    for (int64_t t = 1; t <= x.size(0); ++t) starts.push_back(t * x.size(1));
    return starts;
  }
  check(x.dim() == 2, "x must have two dimensions [rows, K] where there are batch_sizes, got ",
        ShapeOf(x));
  check_tensor(*batch_sizes, "batch_sizes", {ScalarType::Long});
  check(batch_sizes->dim() == 1 && batch_sizes->size(0) > 0,
        "batch_sizes must have one dimension and a step at least, got ", ShapeOf(*batch_sizes));
  const Tensor dense = torch::stable::contiguous(*batch_sizes);
  const int64_t* sizes = static_cast<const int64_t*>(dense.const_data_ptr());
  for (int64_t t = 0; t < dense.size(0); ++t) {
    check(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
          "batch_sizes must be positive and not increase, got ", sizes[t], " at step ", t);
    check(sizes[t] <= x.size(0) - starts.back(), "batch_sizes must add up to the ", x.size(0),
          " rows of x, got more");
    starts.push_back(starts.back() + sizes[t]);
  }
  check(starts.back() == x.size(0), "batch_sizes must add up to the ", x.size(0),
        " rows of x, got ", starts.back());
  return starts;
}

State::State(const Tensor& given, const char* name, const Tensor& x, int64_t batch_)
    : batch(batch_), size(0) {
  check_tensor(given, name, {x.scalar_type()});
  check(given.dim() == 2 && given.size(0) == batch, name, " must have the shape [", batch,
        ", size], one row for each sequence of the batch, got ", ShapeOf(given));
  size = given.size(1);
  values.reset(new float[static_cast<size_t>(batch * size)]);
  const Tensor dense = torch::stable::contiguous(given);
  const int64_t count = batch * size;
  with_dtype(check_out_dtype(x.scalar_type()), [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(dense.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = widen(from[i]);
  });
}

Tensor State::tensor(ScalarType dtype) const {
  Tensor out = empty({batch, size}, dtype);
  narrow_row(row(0), batch * size, check_out_dtype(dtype), out.mutable_data_ptr());
  return out;
}

void narrow_row(const float* from, int64_t count, Dtype dtype, void* to) {
  if (dtype == Dtype::f32) {
    std::copy(from, from + count, static_cast<float*>(to));  // of nothing, from null as well
    return;
  }
  with_dtype(dtype, [&](auto type) {
    auto* out = static_cast<decltype(type)*>(to);
    for (int64_t i = 0; i < count; ++i) narrow(from[i], out + i);
  });
}

}  // namespace dynquant
