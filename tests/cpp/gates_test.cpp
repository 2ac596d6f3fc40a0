// The end of a step of a recurrent layer.
#include <cmath>
#include <random>
#include <vector>

#include "exp_of_one.h"
#include "kernel_test.h"

namespace dynquant {
namespace {

// A row's states after a step: h, then c.
std::vector<float> gates_of(Cell cell, const std::vector<float>& input,
                            const std::vector<float>& hidden, std::vector<float> states,
                            int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto sum = [&](int64_t gate) { return input[gate * n + i] + hidden[gate * n + i]; };
    float& h = states[i];
    float& c = states[n + i];
    if (cell == Cell::lstm) {
      c = sigmoid_of(sum(1)) * c + sigmoid_of(sum(0)) * tanh_of(sum(2));
      h = sigmoid_of(sum(3)) * tanh_of(c);
    } else if (cell == Cell::gru) {
      const float added = tanh_of(input[2 * n + i] + sigmoid_of(sum(0)) * hidden[2 * n + i]);
      h = (h - added) * sigmoid_of(sum(1)) + added;
    } else if (cell == Cell::rnn_tanh) {
      h = tanh_of(sum(0));
    } else {
      h = sum(0) < 0.0f ? 0.0f : sum(0);
    }
  }
  return states;
}

void test_step(const Kernels& kernels, int64_t n, std::mt19937& random) {
  std::normal_distribution<float> real(0.0f, 3.0f);
  const auto drawn = [&](int64_t count) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(random() % 40 == 0 ? NAN : real(random));
    return values;
  };
  for (Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu}) {
    const int64_t gates = cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
    const std::vector<float> input = drawn(gates * n), hidden = drawn(gates * n);
    const std::vector<float> before = drawn(2 * n);
    const std::vector<float> wanted = gates_of(cell, input, hidden, before, n);
    std::vector<float> h(before.begin(), before.begin() + n), c(before.begin() + n, before.end());
    kernels.gates(
        {cell, input.data(), hidden.data(), n, h.data(), cell == Cell::lstm ? c.data() : nullptr});
    for (int64_t i = 0; i < n; ++i) {
      expect(same(h[i], wanted[i]), kernels.name, "h", static_cast<long>(cell), n, i);
      expect(same(c[i], wanted[n + i]), kernels.name, "c", static_cast<long>(cell), n, i);
    }
  }
}

}  // namespace

void test_gates(const Kernels& kernels, std::mt19937& random) {
  for (int64_t n = 0; n < 70; ++n) test_step(kernels, n, random);
}

}  // namespace dynquant
