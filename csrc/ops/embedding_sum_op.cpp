// embedding_sum: rows of float tables added up, and a norm of the sum.
#include "indices.h"
#include "ops.h"
#include "parallel.h"
#include "row_norm.h"

namespace dynquant {
namespace {

constexpr NormNames kNorm = {"norm", "norm_weight", "norm_bias", "norm_eps"};

// A table [rows, K] of which each output row takes one.
struct FloatTable {
  FloatTable(const Tensor& table, const char* name, ScalarType dtype, int64_t k)
      : rows(checked(table, name, dtype)) {
    check(rows.k == k, name, " must have K = ", k, ", like table, got ", ShapeOf(table));
  }
  static Rows checked(const Tensor& table, const char* name, ScalarType dtype) {
    check_tensor(table, name, {dtype});
    check(table.dim() == 2, name, " must have two dimensions [rows, K], got ", ShapeOf(table));
    return rows_of(table, name);
  }
  const char* row(int64_t r) const { return rows.data + r * rows.stride; }

  Rows rows;
};

}  // namespace

Tensor embedding_sum(const Tensor& indices, const Tensor& table,
                     const std::optional<Tensor>& type_indices,
                     const std::optional<Tensor>& type_table,
                     const std::optional<Tensor>& position_table, int64_t norm,
                     const std::optional<Tensor>& norm_weight,
                     const std::optional<Tensor>& norm_bias, double norm_eps) {
  const Dtype dtype = check_float(table, "table");
  const ScalarType type = table.scalar_type();
  const Rows words = FloatTable::checked(table, "table", type);
  const int64_t k = words.k;
  const Indices ids(indices, words.m);
  const int64_t length = indices.dim() == 0 ? 1 : indices.size(indices.dim() - 1);
  std::optional<FloatTable> types, positions;
  std::optional<Indices> type_ids;
  check(type_table.has_value() || !type_indices.has_value(),
        "type_indices are given without type_table");
  if (type_table.has_value()) {
    types.emplace(*type_table, "type_table", type, k);
    check(types->rows.m > 0, "type_table must have a row, got ", ShapeOf(*type_table));
  }
  if (type_indices.has_value()) {
    type_ids.emplace(*type_indices, types->rows.m, "type_indices");
    check_same_shape(*type_indices, "type_indices", indices, "indices");
  }
  if (position_table.has_value()) {
    positions.emplace(*position_table, "position_table", type, k);
    check(positions->rows.m >= length, "position_table must have a row for each of ", length,
          " positions, got ", ShapeOf(*position_table));
  }
  const RowNorm by(norm, norm_weight, norm_bias, norm_eps, k, kNorm);

  const Kernels& kernels = kernels_in_use();
  Tensor y = empty(shape_with(indices, k), type);
  const int64_t row_bytes = k * static_cast<int64_t>(y.element_size());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  run_range(ids.count, 4 * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      char* to = out + m * row_bytes;
      const char* sum = words.data + ids.at(m) * words.stride;
      const char* last = nullptr;  // what the norm adds to it
      if (types.has_value()) last = types->row(type_ids.has_value() ? type_ids->at(m) : 0);
      if (positions.has_value()) {
        if (last != nullptr) {
          kernels.norm({Norm::none, dtype, sum, last, k, nullptr, nullptr, 0.0f, to});
          sum = to;
        }
        last = positions->row(m % length);
      }
      by.apply(kernels, dtype, sum, last, to);
    }
  });
  return y;
}

}  // namespace dynquant
