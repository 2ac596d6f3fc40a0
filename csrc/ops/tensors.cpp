#include "tensors.h"

#include <algorithm>

#include "device.h"

namespace dynquant {
namespace {

template <class Sizes>
void write_shape(std::ostream& out, const Sizes& sizes) {
  const char* before = "[";
  for (int64_t size : sizes) {
    out << before << size;
    before = ", ";
  }
  out << (sizes.size() == 0 ? "[]" : "]");
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  write_shape(out, shape.tensor.sizes());
  return out;
}

const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

void check_tensor(const Tensor& t, const char* name, std::initializer_list<ScalarType> dtypes) {
  check(t.defined(), name, " must be a tensor, got None");
  check(t.layout() == torch::headeronly::Layout::Strided, name, " must be a dense tensor");
  check_device(t, name);
  const ScalarType given = t.scalar_type();
  for (ScalarType dtype : dtypes) {
    if (given == dtype) return;
  }
  std::ostringstream allowed;
  for (ScalarType dtype : dtypes) {
    allowed << (dtype == *dtypes.begin() ? "" : ", ") << dtype_text(dtype);
  }
  fail(name, " must have dtype ", allowed.str(), ", got ", dtype_text(given));
}

void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  const auto given = t.sizes();
  if (std::equal(shape.begin(), shape.end(), given.begin(), given.end())) return;
  std::ostringstream wanted;
  write_shape(wanted, shape);
  fail(name, " must have the shape ", wanted.str(), ", got ", ShapeOf(t));
}

void check_written(const Tensor& state) {
  check_tensor(state, "state", {ScalarType::Float});
  check(state.is_contiguous(), "state must be contiguous, since it is written to, got ",
        ShapeOf(state));
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

void check_same_shape(const Tensor& t, const char* name, const Tensor& like,
                      const char* like_name) {
  const auto given = t.sizes(), wanted = like.sizes();
  check(std::equal(wanted.begin(), wanted.end(), given.begin(), given.end()), name,
        " must have the shape of ", like_name, ", ", ShapeOf(like), ", got ", ShapeOf(t));
}

Dtype check_float(const Tensor& t, const char* name) {
  check_tensor(t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  return check_out_dtype(t.scalar_type());
}

Dtype check_out_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail("dtype must be float32, bfloat16, float16, got ", dtype_text(dtype));
  }
}

namespace {

// Bytes between rows where all rows lie at one distance; -1 where they do not.
int64_t row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return -1;
  int64_t stride = 0, rows = 1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (rows == 1) {
      stride = t.stride(d);
    } else if (t.stride(d) != stride * rows) {
      return -1;
    }
    rows *= t.size(d);
  }
  return stride * static_cast<int64_t>(t.element_size());
}

}  // namespace

Rows rows_of(const Tensor& t, const char* name) {
  check(t.dim() >= 1, name, " must have at least one dimension, got a scalar");
  Rows rows{t, nullptr, 1, t.size(t.dim() - 1), 0};
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows.m *= t.size(d);
  rows.stride = rows.m == 0 || rows.k == 0 ? 0 : row_stride(t);
  if (rows.stride < 0) {
    rows.holder = torch::stable::contiguous(t);
    rows.stride = rows.k * static_cast<int64_t>(t.element_size());
  }
  rows.data = static_cast<const char*>(rows.holder.const_data_ptr());
  return rows;
}

std::vector<int64_t> leading_shape(const Tensor& like, int64_t last) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  if (last >= 0) shape.push_back(last);
  return shape;
}

std::vector<int64_t> shape_with(const Tensor& like, int64_t last) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.push_back(last);
  return shape;
}

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  constexpr int64_t kSomeElements = 1 << 14;
  constexpr int64_t kManyElements = 1 << 20;
  const int64_t dims = static_cast<int64_t>(shape.size());
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = stride;
    stride *= std::max<int64_t>(shape[static_cast<size_t>(d)], 1);
  }
  if (stride >= kSomeElements) prepare_allocator();
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const Device device = current_device();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.data(), strides.data(), code,
                                                         device.type, device.index, &handle));
  Tensor result(handle);
  if (stride >= kManyElements) {  // asking a small tensor for its address would cost a call more
    prepare_large(result.mutable_data_ptr(),
                  result.numel() * static_cast<int64_t>(result.element_size()));
  }
  return result;
}

PerRow per_row(const Tensor& t, const char* name, ScalarType dtype, const Tensor& rows) {
  check_tensor(t, name, {dtype});
  const std::vector<int64_t> wanted = leading_shape(rows, -1);
  const auto given = t.sizes();
  const bool for_each = std::vector<int64_t>(given.begin(), given.end()) == wanted;
  const bool single = t.dim() == 1 && t.size(0) == 1;
  check(for_each || single, name, " must have the shape [1] or that of the rows of ", ShapeOf(rows),
        ", got ", ShapeOf(t));
  const Tensor held = dense(t);
  return {held, held.const_data_ptr(), for_each ? 1 : 0};
}

FloatBias::FloatBias(const std::optional<Tensor>& bias, std::initializer_list<int64_t> shape,
                     const char* name) {
  if (!bias.has_value()) return;
  const Dtype dtype = check_float(*bias, name);
  check_shape(*bias, name, shape);
  holder = dtype == Dtype::f32 ? *bias : torch::stable::to(*bias, ScalarType::Float);
  holder = dense(*holder);
  data = static_cast<const float*>(holder->const_data_ptr());
}

}  // namespace dynquant
