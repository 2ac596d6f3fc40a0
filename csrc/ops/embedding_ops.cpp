// quantize_embedding, embedding and embedding_bag.
#include <atomic>

#include "indices.h"
#include "ops.h"
#include "parallel.h"

namespace dynquant {
namespace {

void check_bits(int64_t bits) { check(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits); }

int64_t bytes_of_row(int64_t dim, int64_t bits) { return bits == 8 ? dim : (dim + 1) / 2; }

// A quantized table, with the tensors that hold it.
struct Table {
  Tensor rows, qparams;
  int64_t count;

  // Sets what BagArgs says of the table.
  Table(const Tensor& given_rows, const Tensor& given_qparams, int64_t bits, int64_t dim,
        BagArgs* args) {
    check_bits(bits);
    check_tensor(given_rows, "rows", {ScalarType::Byte});
    check_tensor(given_qparams, "qparams", {ScalarType::Float});
    check(given_rows.dim() == 2, "rows must have two dimensions, got ", ShapeOf(given_rows));
    count = given_rows.size(0);
    check(dim >= 0 && dim <= (int64_t{1} << 40), "dim must be the width of the table, got ", dim);
    check(given_rows.size(1) == bytes_of_row(dim, bits), "rows must have the shape [", count, ", ",
          bytes_of_row(dim, bits), "] for dim = ", dim, " at ", bits, " bits, got ",
          ShapeOf(given_rows));
    check(given_qparams.dim() == 2 && given_qparams.size(0) == count && given_qparams.size(1) == 2,
          "qparams must have the shape [", count, ", 2], got ", ShapeOf(given_qparams));
    rows = dense(given_rows);
    qparams = dense(given_qparams);
    args->rows = static_cast<const uint8_t*>(rows.const_data_ptr());
    args->row_bytes = given_rows.size(1);
    args->bits = static_cast<int>(bits);
    args->qparams = static_cast<const float*>(qparams.const_data_ptr());
    args->dim = dim;
  }
};

// Checks the indices and sets what BagArgs says of them; gives the tensor that holds them.
Tensor read_indices(const Tensor& indices, int64_t rows, BagArgs* args) {
  const Indices read(indices, rows);
  args->indices = read.data;
  args->wide_indices = read.wide;
  args->count = read.count;
  return read.holder;
}

// Where each bag begins, and where the last one ends.
std::vector<int64_t> read_offsets(const Tensor& offsets, int64_t indices, bool include_last) {
  check_tensor(offsets, "offsets", {ScalarType::Long, ScalarType::Int});
  check(offsets.dim() == 1, "offsets must have one dimension, got ", ShapeOf(offsets));
  check(!include_last || offsets.size(0) > 0,
        "offsets must have at least one element where include_last_offset is set");
  const Tensor wide = dense(offsets.scalar_type() == ScalarType::Long
                                ? offsets
                                : torch::stable::to(offsets, ScalarType::Long));
  const int64_t* data = static_cast<const int64_t*>(wide.const_data_ptr());
  std::vector<int64_t> starts(data, data + wide.numel());
  if (!include_last) starts.push_back(indices);
  check(starts.front() == 0 || starts.size() == 1, "offsets must begin with 0, got ",
        starts.front());
  for (size_t b = 1; b < starts.size(); ++b) {
    check(starts[b - 1] <= starts[b],
          "offsets must not decrease nor exceed the number of indices (", indices, "), found ",
          starts[b - 1], " before ", starts[b]);
  }
  check(starts.back() >= 0 && starts.back() <= indices, "offsets must not exceed the number of ",
        "indices (", indices, "), got ", starts.back());
  return starts;
}

void run_bags(const Kernels& kernels, const BagArgs& args, int64_t bags) {
  const int64_t bag_bytes = args.count * args.row_bytes / std::max<int64_t>(bags, 1) + args.dim;
  run_range(bags, bag_bytes, [&](int64_t begin, int64_t end) {
    BagArgs part = args;
    part.begin = begin;
    part.end = end;
    kernels.bags(part);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_embedding(const Tensor& weight, int64_t bits) {
  const Dtype dtype = check_float(weight, "weight");
  check(weight.dim() == 2, "weight must have two dimensions [rows, dim], got ", ShapeOf(weight));
  check_bits(bits);
  const Kernels& kernels = kernels_in_use();
  const Rows rows = rows_of(weight, "weight");
  const int64_t row_bytes = bytes_of_row(rows.k, bits);
  Tensor q = empty({rows.m, row_bytes}, ScalarType::Byte);
  Tensor qparams = empty({rows.m, 2}, ScalarType::Float);
  uint8_t* bytes = static_cast<uint8_t*>(q.mutable_data_ptr());
  float* params = static_cast<float*>(qparams.mutable_data_ptr());
  std::atomic<int64_t> wrong{-1};
  run_range(Threads::kOwn, rows.m, rows.k, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      if (!kernels.quantize_row(rows.data + m * rows.stride, dtype, rows.k, static_cast<int>(bits),
                                bytes + m * row_bytes, params + 2 * m)) {
        wrong = m;
      }
    }
  });
  check(wrong < 0, "weight holds NaN or Inf, or spans more than fp32 can hold, in row ",
        static_cast<int64_t>(wrong));
  return {q, qparams};
}

Tensor embedding(const Tensor& indices, const Tensor& rows, const Tensor& qparams, int64_t bits,
                 int64_t dim, ScalarType dtype) {
  const Kernels& kernels = kernels_in_use();
  BagArgs args = {};
  const Table table(rows, qparams, bits, dim, &args);
  args.out_dtype = check_out_dtype(dtype);
  const Tensor held = read_indices(indices, table.count, &args);
  args.bag_size = 1;
  args.padding_idx = -1;
  Tensor out = empty(shape_with(indices, dim), dtype);
  args.out = out.mutable_data_ptr();
  run_bags(kernels, args, args.count);
  return out;
}

Tensor embedding_bag(const Tensor& indices, const Tensor& rows, const Tensor& qparams, int64_t bits,
                     int64_t dim, ScalarType dtype, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& per_sample_weights, int64_t mode,
                     bool include_last_offset, int64_t padding_idx) {
  const Kernels& kernels = kernels_in_use();
  BagArgs args = {};
  const Table table(rows, qparams, bits, dim, &args);
  args.out_dtype = check_out_dtype(dtype);
  check(mode >= 0 && mode <= 2, "mode must be 0 (sum), 1 (mean) or 2 (max), got ", mode);
  args.mode = static_cast<BagMode>(mode);
  check(padding_idx >= -1 && padding_idx < table.count,
        "padding_idx must be -1 (none) or lie in "
        "[0, ",
        table.count, "), got ", padding_idx);
  args.padding_idx = padding_idx;
  check(indices.defined() && (indices.dim() == 2 || indices.dim() == 1),
        "indices must have one dimension, or two without offsets");
  check((indices.dim() == 1) == offsets.has_value(), "indices of shape ", ShapeOf(indices),
        offsets.has_value() ? " must come without offsets" : " must come with offsets");
  const Tensor held = read_indices(indices, table.count, &args);
  int64_t bags = indices.size(0);
  std::vector<int64_t> starts;
  if (offsets.has_value()) {
    starts = read_offsets(*offsets, args.count, include_last_offset);
    bags = static_cast<int64_t>(starts.size()) - 1;
    args.offsets = starts.data();
  } else {
    args.bag_size = indices.size(1);
  }
  std::optional<Tensor> weights;
  if (per_sample_weights.has_value()) {
    check(args.mode == BagMode::sum, "per_sample_weights need mode 0 (sum), got mode ", mode);
    check_float(*per_sample_weights, "per_sample_weights");
    check_same_shape(*per_sample_weights, "per_sample_weights", indices, "indices");
    weights = dense(per_sample_weights->scalar_type() == ScalarType::Float
                        ? *per_sample_weights
                        : torch::stable::to(*per_sample_weights, ScalarType::Float));
    args.per_sample_weights = static_cast<const float*>(weights->const_data_ptr());
  }
  Tensor out = empty({bags, dim}, dtype);
  args.out = out.mutable_data_ptr();
  run_bags(kernels, args, bags);
  return out;
}

}  // namespace dynquant
