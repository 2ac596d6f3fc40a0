// lstm_dynamic, gru_dynamic and rnn_dynamic: one direction of one recurrent layer over a whole
// sequence.
//
// The input's products of many steps are one product. What depends on the step before, the product
// of the hidden state and the gates, follows step by step. States are fp32 within a call.
#include <cstring>
#include <memory>

#include "../cpu/convert.h"
#include "activation.h"
#include "multiply.h"
#include "ops.h"

namespace dynquant {
namespace {

// Input rows whose products are made at once: enough for a product at full speed, few enough for
// the products to stay in a cache until their steps come.
constexpr int64_t kInputRows = 192;

int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// A packed weight with the epilogue of its products.
struct Product {
  Packed weight;
  Columns columns;

  Product(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
          const ColumnNames& names)
      : weight(check_packed(packed, names.packed)), columns(scale, bias, weight.n, names) {
    columns.args.out_dtype = Dtype::f32;
    columns.args.out_stride = weight.n;
  }
};

constexpr ColumnNames kInputNames = {"packed_ih", "weight_scale_ih", "bias_ih"};
constexpr ColumnNames kHiddenNames = {"packed_hh", "weight_scale_hh", "bias_hh"};
constexpr ColumnNames kProjectionNames = {"packed_hr", "weight_scale_hr", "bias_hr"};

void check_size(const char* name, const char* what, int64_t given, int64_t wanted) {
  check(given == wanted, name, " must have ", what, " = ", wanted, ", got ", given);
}

// Where the rows of each step begin in x, and, last, where those of the last one end.
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

// A state [B, size] in fp32, from a tensor of x's dtype.
struct State {
  int64_t batch, size;
  std::unique_ptr<float[]> values;

  State(const Tensor& given, const char* name, const Tensor& x, int64_t batch_)
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

  float* row(int64_t r) const { return values.get() + r * size; }

  Tensor tensor(ScalarType dtype) const {
    Tensor out = empty({batch, size}, dtype);
    narrow_row(row(0), batch * size, check_out_dtype(dtype), out.mutable_data_ptr());
    return out;
  }

  template <class F>
  static void with_dtype(Dtype dtype, F f) {
    if (dtype == Dtype::bf16) return f(Bfloat16());
    if (dtype == Dtype::f16) return f(Half());
    f(float());
  }

  static void narrow_row(const float* from, int64_t count, Dtype dtype, void* to) {
    if (dtype == Dtype::f32) {
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    with_dtype(dtype, [&](auto type) {
      auto* out = static_cast<decltype(type)*>(to);
      for (int64_t i = 0; i < count; ++i) narrow(from[i], out + i);
    });
  }
};

struct Options {
  bool reverse;
  bool per_token;
  bool symmetric;
};

class Recurrence {
 public:
  Recurrence(Cell cell, const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0,
             Product input, Product hidden, std::optional<Product> projection,
             const std::optional<Tensor>& batch_sizes, Options options)
      : kernels_(kernels_in_use()),
        cell_(cell),
        dtype_(check_float(x, "x")),
        x_type_(x.scalar_type()),
        starts_(step_starts(x, batch_sizes)),
        x_rows_(rows_of(x, "x")),
        h_(h0, "h0", x, starts_[1]),
        input_(std::move(input)),
        hidden_(std::move(hidden)),
        projection_(std::move(projection)),
        options_(options) {
    if (c0.has_value()) c_.emplace(*c0, "c0", x, starts_[1]);
    size_ = c_.has_value() ? c_->size : h_.size;
    const int64_t columns = gates_of(cell) * size_;
    check_size("x", "K, like packed_ih,", x_rows_.k, input_.weight.k);
    check_size("h0", "a size, like the K of packed_hh,", h_.size, hidden_.weight.k);
    check_size("packed_ih", "N, from the size of the state,", input_.weight.n, columns);
    check_size("packed_hh", "N, from the size of the state,", hidden_.weight.n, columns);
    if (projection_.has_value()) {
      check_size("packed_hr", "K, the size of c0,", projection_->weight.k, size_);
      check_size("packed_hr", "N, the size of h0,", projection_->weight.n, h_.size);
    } else {
      check_size("h0", "a size, like c0,", h_.size, size_);
    }
    std::vector<int64_t> shape = leading_shape(x, h_.size);
    y_ = empty(shape, x_type_);
  }

  void run() {
    const int64_t steps = static_cast<int64_t>(starts_.size()) - 1;
    if (starts_[1] == 0) return;
    prepare();
    const int64_t rows = ceil_div(starts_.back(), ceil_div(starts_.back(), kInputRows));
    int64_t done = 0;
    while (done < steps) {
      // The steps that come next: as many as give `rows` rows, so that no part is a small one.
      int64_t low = options_.reverse ? steps - done : done, high = low;
      do {
        options_.reverse ? --low : ++high;
        ++done;
      } while (done < steps && starts_[high] - starts_[low] < rows);
      run_steps(low, high);
    }
  }

  Tensor y() const { return y_; }
  Tensor h_n() const { return h_.tensor(x_type_); }
  Tensor c_n() const { return c_->tensor(x_type_); }

 private:
  int64_t rows_at(int64_t step) const { return starts_[step + 1] - starts_[step]; }

  void prepare() {
    const int64_t batch = starts_[1], columns = gates_of(cell_) * size_;
    const int64_t input_rows = std::min(starts_.back(), kInputRows + batch);
    const int64_t unprojected = projection_.has_value() ? batch * size_ : 0;
    const int64_t count = (input_rows + batch) * columns + unprojected;
    input_products_ = reinterpret_cast<float*>(
        scratch(static_cast<size_t>(count) * sizeof(float), Purpose::recurrence));
    hidden_products_ = input_products_ + input_rows * columns;
    unprojected_ = hidden_products_ + batch * columns;
    if (!options_.per_token) {
      const Range range = range_of_rows(kernels_, x_rows_, dtype_);
      const FloatEnv env;
      x_params_ = choose_qparams(range, options_.symmetric);
    }
  }

  // Steps [low, high), the last one first where the direction is reversed.
  void run_steps(int64_t low, int64_t high) {
    FloatRows rows{kernels_, x_rows_, dtype_, options_.symmetric, x_params_};
    rows.rows.data += starts_[low] * x_rows_.stride;
    product(rows, starts_[high] - starts_[low], input_, input_products_);
    for (int64_t i = 0; i < high - low; ++i) {
      const int64_t step = options_.reverse ? high - 1 - i : low + i;
      run_step(step, input_products_ + (starts_[step] - starts_[low]) * input_.weight.n);
    }
  }

  void run_step(int64_t step, const float* input_products) {
    const int64_t rows = rows_at(step), columns = hidden_.weight.n;
    product(state_rows(h_.row(0), rows, h_.size), rows, hidden_, hidden_products_);
    float* h = projection_.has_value() ? unprojected_ : h_.row(0);
    // An activation function costs some forty operations.
    run_range(rows, columns * 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        GatesArgs a = {};
        a.cell = cell_;
        a.input = input_products + row * columns;
        a.hidden = hidden_products_ + row * columns;
        a.n = size_;
        a.h = h + row * size_;
        a.c = c_.has_value() ? c_->row(row) : nullptr;
        kernels_.gates(a);
      }
    });
    if (projection_.has_value()) {
      product(state_rows(h, rows, size_), rows, *projection_, h_.row(0));
    }
    char* y = static_cast<char*>(y_.mutable_data_ptr()) +
              starts_[step] * h_.size * static_cast<int64_t>(y_.element_size());
    State::narrow_row(h_.row(0), rows * h_.size, dtype_, y);
  }

  FloatRows state_rows(const float* state, int64_t rows, int64_t size) const {
    Rows all{};
    all.data = reinterpret_cast<const char*>(state);
    all.m = rows;
    all.k = size;
    all.stride = size * static_cast<int64_t>(sizeof(float));
    std::optional<QParams> whole;
    if (!options_.per_token) {
      const Range range = range_of_rows(kernels_, all, Dtype::f32);
      const FloatEnv env;
      whole = choose_qparams(range, options_.symmetric);
    }
    return {kernels_, all, Dtype::f32, options_.symmetric, whole};
  }

  void product(const FloatRows& rows, int64_t m, const Product& by, float* out) const {
    EpilogueArgs epilogue = by.columns.args;
    epilogue.out = out;
    multiply(kernels_, rows, m, by.weight, epilogue, sizeof(float));
  }

  const Kernels& kernels_;
  const Cell cell_;
  const Dtype dtype_;
  const ScalarType x_type_;
  const std::vector<int64_t> starts_;
  const Rows x_rows_;
  State h_;
  std::optional<State> c_;
  const Product input_, hidden_;
  const std::optional<Product> projection_;
  const Options options_;
  int64_t size_ = 0;
  Tensor y_;
  std::optional<QParams> x_params_;  // per_tensor
  float *input_products_ = nullptr, *hidden_products_ = nullptr, *unprojected_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_dynamic(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& packed_ih,
    const Tensor& weight_scale_ih, const std::optional<Tensor>& bias_ih, const Tensor& packed_hh,
    const Tensor& weight_scale_hh, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& packed_hr, const std::optional<Tensor>& weight_scale_hr,
    const std::optional<Tensor>& batch_sizes, bool reverse, bool per_token, bool symmetric) {
  check(packed_hr.has_value() == weight_scale_hr.has_value(),
        "packed_hr and weight_scale_hr must both be given or neither");
  std::optional<Product> projection;
  if (packed_hr.has_value()) {
    projection.emplace(*packed_hr, *weight_scale_hr, std::nullopt, kProjectionNames);
  }
  Recurrence layer(Cell::lstm, x, h0, c0, {packed_ih, weight_scale_ih, bias_ih, kInputNames},
                   {packed_hh, weight_scale_hh, bias_hh, kHiddenNames}, std::move(projection),
                   batch_sizes, {reverse, per_token, symmetric});
  layer.run();
  return {layer.y(), layer.h_n(), layer.c_n()};
}

namespace {

std::tuple<Tensor, Tensor> without_cell_state(
    Cell cell, const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
    const Tensor& weight_scale_ih, const std::optional<Tensor>& bias_ih, const Tensor& packed_hh,
    const Tensor& weight_scale_hh, const std::optional<Tensor>& bias_hh,
    const std::optional<Tensor>& batch_sizes, Options options) {
  Recurrence layer(cell, x, h0, std::nullopt, {packed_ih, weight_scale_ih, bias_ih, kInputNames},
                   {packed_hh, weight_scale_hh, bias_hh, kHiddenNames}, std::nullopt, batch_sizes,
                   options);
  layer.run();
  return {layer.y(), layer.h_n()};
}

}  // namespace

std::tuple<Tensor, Tensor> gru_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric) {
  return without_cell_state(Cell::gru, x, h0, packed_ih, weight_scale_ih, bias_ih, packed_hh,
                            weight_scale_hh, bias_hh, batch_sizes, {reverse, per_token, symmetric});
}

std::tuple<Tensor, Tensor> rnn_dynamic(const Tensor& x, const Tensor& h0, const Tensor& packed_ih,
                                       const Tensor& weight_scale_ih,
                                       const std::optional<Tensor>& bias_ih,
                                       const Tensor& packed_hh, const Tensor& weight_scale_hh,
                                       const std::optional<Tensor>& bias_hh, bool relu,
                                       const std::optional<Tensor>& batch_sizes, bool reverse,
                                       bool per_token, bool symmetric) {
  return without_cell_state(relu ? Cell::rnn_relu : Cell::rnn_tanh, x, h0, packed_ih,
                            weight_scale_ih, bias_ih, packed_hh, weight_scale_hh, bias_hh,
                            batch_sizes, {reverse, per_token, symmetric});
}

}  // namespace dynquant
