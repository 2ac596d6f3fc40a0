// One direction of one recurrent layer over a whole sequence, whatever holds its weights.
//
// The input's products of many steps are one product. What depends on the step before, the product
// of the hidden state and the gates, follows step by step. States are fp32 within a call.
#pragma once

#include <algorithm>
#include <memory>

#include "../cpu/layout.h"
#include "layer_product.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace dynquant {

// Where the rows of each step begin in x, and, last, where those of the last one end.
std::vector<int64_t> step_starts(const Tensor& x, const std::optional<Tensor>& batch_sizes);

// A state [batch, size] in fp32, from a tensor of x's dtype.
struct State {
  int64_t batch, size;
  std::unique_ptr<float[]> values;

  State(const Tensor& given, const char* name, const Tensor& x, int64_t batch);
  float* row(int64_t r) const { return values.get() + r * size; }
  Tensor tensor(ScalarType dtype) const;
};

// Rounds `count` values to the dtype.
void narrow_row(const float* from, int64_t count, Dtype dtype, void* to);

template <class... Parts>
void check_size(int64_t given, int64_t wanted, const Parts&... what) {
  check(given == wanted, what..., " = ", wanted, ", got ", given);
}

class Recurrence {
 public:
  Recurrence(Cell cell, const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0,
             LayerProduct input, LayerProduct hidden, std::optional<LayerProduct> projection,
             const std::optional<Tensor>& batch_sizes, bool reverse)
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
        reverse_(reverse) {
    if (c0.has_value()) c_.emplace(*c0, "c0", x, starts_[1]);
    size_ = c_.has_value() ? c_->size : h_.size;
    const int64_t gates = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
    check_size(x_rows_.k, input_.k(), "x must have K, like ", input_.name(), ",");
    check_size(h_.size, hidden_.k(), "h0 must have a size, like the K of ", hidden_.name(), ",");
    for (const LayerProduct* gated : {&input_, &hidden_}) {
      check_size(gated->n(), gates * size_, gated->name(),
                 " must have N, from the size of the state,");
    }
    if (projection_.has_value()) {
      check_size(projection_->k(), size_, projection_->name(), " must have K, the size of c0,");
      check_size(projection_->n(), h_.size, projection_->name(), " must have N, the size of h0,");
    } else {
      check_size(h_.size, size_, "h0 must have a size, like c0,");
    }
    y_ = empty(leading_shape(x, h_.size), x_type_);
  }

  void run() {
    if (starts_[1] == 0) return;
    const int64_t steps = static_cast<int64_t>(starts_.size()) - 1;
    const double each = hidden_.nanoseconds(kernels_, starts_[1]);
    with_team(static_cast<double>(steps) * each, [&] { run_all(steps); });
  }

  Tensor y() const { return y_; }
  Tensor h_n() const { return h_.tensor(x_type_); }
  Tensor c_n() const { return c_->tensor(x_type_); }

 private:
  void run_all(int64_t steps) {
    prepare();
    const int64_t rows = ceil_div(starts_.back(), ceil_div(starts_.back(), kInputRows));
    int64_t done = 0;
    while (done < steps) {
      // The steps that come next: as many as give `rows` rows, so that no part is a small one.
      int64_t low = reverse_ ? steps - done : done, high = low;
      do {
        reverse_ ? --low : ++high;
        ++done;
      } while (done < steps && starts_[high] - starts_[low] < rows);
      run_steps(low, high);
    }
  }

  // Input rows whose products are made at once: enough for a product at full speed, few enough for
  // the products to stay in a cache until their steps come.
  static constexpr int64_t kInputRows = 192;

  void prepare() {
    const int64_t batch = starts_[1], columns = hidden_.n();
    const int64_t input_rows = std::min(starts_.back(), kInputRows + batch);
    const int64_t unprojected = projection_.has_value() ? batch * size_ : 0;
    const int64_t count = (input_rows + batch) * columns + unprojected;
    input_products_ = reinterpret_cast<float*>(
        scratch(static_cast<size_t>(count) * sizeof(float), Purpose::recurrence));
    hidden_products_ = input_products_ + input_rows * columns;
    unprojected_ = hidden_products_ + batch * columns;
    x_whole_ = input_.whole(kernels_, x_rows_, dtype_);
  }

  // Steps [low, high), the last one first where the direction is reversed.
  void run_steps(int64_t low, int64_t high) {
    Rows rows = x_rows_;
    rows.data += starts_[low] * x_rows_.stride;
    rows.m = starts_[high] - starts_[low];
    input_.multiply(kernels_, rows, dtype_, x_whole_, input_products_);
    for (int64_t i = 0; i < high - low; ++i) {
      const int64_t step = reverse_ ? high - 1 - i : low + i;
      run_step(step, input_products_ + (starts_[step] - starts_[low]) * input_.n());
    }
  }

  void run_step(int64_t step, const float* input_products) {
    const int64_t rows = starts_[step + 1] - starts_[step], columns = hidden_.n();
    multiply_state(h_.row(0), rows, hidden_, hidden_products_);
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
    if (projection_.has_value()) multiply_state(h, rows, *projection_, h_.row(0));
    char* y = static_cast<char*>(y_.mutable_data_ptr()) +
              starts_[step] * h_.size * static_cast<int64_t>(y_.element_size());
    narrow_row(h_.row(0), rows * h_.size, dtype_, y);
  }

  void multiply_state(const float* state, int64_t rows, const LayerProduct& by, float* out) const {
    Rows all{};
    all.data = reinterpret_cast<const char*>(state);
    all.m = rows;
    all.k = by.k();
    all.stride = by.k() * static_cast<int64_t>(sizeof(float));
    by.multiply(kernels_, all, Dtype::f32, by.whole(kernels_, all, Dtype::f32), out);
  }

  const Kernels& kernels_;
  const Cell cell_;
  const Dtype dtype_;
  const ScalarType x_type_;
  const std::vector<int64_t> starts_;
  const Rows x_rows_;
  State h_;
  std::optional<State> c_;
  const LayerProduct input_, hidden_;
  const std::optional<LayerProduct> projection_;
  const bool reverse_;
  int64_t size_ = 0;
  Tensor y_;
  std::optional<QParams> x_whole_;
  float *input_products_ = nullptr, *hidden_products_ = nullptr, *unprojected_ = nullptr;
};

// A layer without a cell state and a projection: y and h after the last step.
inline std::tuple<Tensor, Tensor> run_plain(Cell cell, const Tensor& x, const Tensor& h0,
                                            LayerProduct input, LayerProduct hidden,
                                            const std::optional<Tensor>& batch_sizes,
                                            bool reverse) {
  Recurrence layer(cell, x, h0, std::nullopt, std::move(input), std::move(hidden), std::nullopt,
                   batch_sizes, reverse);
  layer.run();
  return {layer.y(), layer.h_n()};
}

inline std::tuple<Tensor, Tensor, Tensor> run_lstm(const Tensor& x, const Tensor& h0,
                                                   const Tensor& c0, LayerProduct input,
                                                   LayerProduct hidden,
                                                   std::optional<LayerProduct> projection,
                                                   const std::optional<Tensor>& batch_sizes,
                                                   bool reverse) {
  Recurrence layer(Cell::lstm, x, h0, c0, std::move(input), std::move(hidden),
                   std::move(projection), batch_sizes, reverse);
  layer.run();
  return {layer.y(), layer.h_n(), layer.c_n()};
}

}  // namespace dynquant
