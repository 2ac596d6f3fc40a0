#include "windows.h"

#include <algorithm>
#include <cstring>

#include "transposed.h"

namespace dynquant {
namespace {

constexpr int64_t kChannelsTogether = 16;  // a cache line of each of their positions

// Between rows of so many values: a power of two would bring them into few cache sets.
constexpr int64_t stride_of(int64_t count) { return count + 16; }

// Values `step` apart as neighbours.
template <class T>
void gather(const T* from, int64_t step, int64_t count, T* to) {
  if (step == 1) return void(std::copy_n(from, count, to));
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
}

// The same in fp32. `beside` has room for the values as they are.
void gather_floats(const Kernels& kernels, const Sequences& x, const char* from, int64_t step,
                   int64_t count, char* beside, float* to) {
  if (x.dtype == Dtype::f32) {
    return gather(reinterpret_cast<const float*>(from), step, count, to);
  }
  if (step != 1) {
    gather(reinterpret_cast<const uint16_t*>(from), step, count,
           reinterpret_cast<uint16_t*>(beside));
    from = beside;
  }
  kernels.widen(from, x.dtype, count, to);
}

// Positions between neighbouring lines.
int64_t step_of(const Windows& windows) { return windows.taps == 1 ? 1 : windows.dilation; }

// Where windows share lines: a run for each of `step` positions, and what all of them hold.
int64_t phases_of(const Windows& windows, int64_t count) {
  return std::min(step_of(windows), windows.span(count));
}
int64_t lines_of_phase(const Windows& windows, int64_t count) {
  return ceil_div(windows.span(count), step_of(windows));
}

bool are_shared(const Windows& windows, int64_t count) {
  // Divided, since the product of the two could overflow.
  return phases_of(windows, count) <= count * windows.taps / lines_of_phase(windows, count);
}

}  // namespace

Sequences::Sequences(const Tensor& x) : holder(x), dtype(check_float(x, "x")) {
  check(x.dim() == 3, "x must have the shape [B, C, L], got ", ShapeOf(x));
  data = static_cast<const char*>(x.const_data_ptr());
  bytes = static_cast<int64_t>(x.element_size());
  batch = x.size(0);
  channels = x.size(1);
  length = x.size(2);
  batch_step = x.stride(0);
  channel_step = x.stride(1);
  position_step = x.stride(2);
}

WindowLines::WindowLines(const Windows& windows, int64_t channels, int64_t count)
    : WindowLines(windows, channels, count, are_shared(windows, count)) {}

WindowLines WindowLines::of(int64_t count) const {
  return WindowLines(windows_, channels_, count, shared_);
}

WindowLines::WindowLines(const Windows& windows, int64_t channels, int64_t count, bool shared)
    : windows_(windows),
      channels_(channels),
      count_(count),
      step_(step_of(windows)),
      shared_(shared),
      runs_(shared ? phases_of(windows, count) : count),
      lines_of_run_(shared ? lines_of_phase(windows, count) : windows.taps) {}

int64_t WindowLines::bytes_beside() const {
  const int64_t positions = shared_ ? windows_.span(count_) : windows_.taps;
  return Pieces::total({kChannelsTogether * stride_of(positions) * 4, positions * 2});
}

void WindowLines::lay(const Kernels& kernels, const Sequences& x, int64_t sequence, int64_t channel,
                      int64_t first, float* out, uint8_t* beside) const {
  const char* data = x.data + (sequence * x.batch_step + channel * x.channel_step) * x.bytes;
  const int64_t position = first * windows_.stride - windows_.left;
  if (shared_) {
    const int64_t span = windows_.span(count_);
    lay_run(
        kernels, x, {data, position, span, 1},
        [&](int64_t i) { return out + line_of(i) * channels_; }, beside);
    // Behind the last position, to the end of each run.
    for (int64_t i = span; i < lines(); ++i) {
      std::fill_n(out + line_of(i) * channels_, channels_, 0.0f);
    }
    return;
  }
  for (int64_t window = 0; window < count_; ++window) {
    float* to = out + window * lines_of_run_ * channels_;
    lay_run(
        kernels, x, {data, position + window * windows_.stride, windows_.taps, step_},
        [&](int64_t i) { return to + i * channels_; }, beside);
  }
}

// line_at(i) is where that of the run's position i goes.
template <class LineAt>
void WindowLines::lay_run(const Kernels& kernels, const Sequences& x, const Run& run,
                          const LineAt& line_at, uint8_t* beside) const {
  const auto first_from = [&](int64_t bound) {
    const int64_t ahead = std::max<int64_t>(0, bound - run.position);
    return std::min(ceil_div(ahead, run.step), run.count);
  };
  const int64_t begin = first_from(0), end = first_from(x.length);
  for (int64_t i = 0; i < run.count; ++i) {
    if (i == begin) i = end;
    if (i < run.count) std::fill_n(line_at(i), channels_, 0.0f);
  }
  if (begin == end) return;
  const auto line_of_inner = [&](int64_t i) { return line_at(begin + i); };
  const int64_t count = end - begin, step = x.position_step * run.step;
  const char* from = run.sequence + (run.position + begin * run.step) * x.position_step * x.bytes;
  if (x.channel_step == 1) {
    for (int64_t i = 0; i < count; ++i) {
      kernels.widen(from + i * step * x.bytes, x.dtype, channels_, line_of_inner(i));
    }
    return;
  }
  // Copied first, channel after channel: reading a few values of many far channels in turn is
  // slower.
  Pieces pieces(beside);
  const int64_t stride = stride_of(count);
  float* rows = pieces.next<float>(kChannelsTogether * stride);
  char* values = pieces.next(count * 2);
  for (int64_t first = 0; first < channels_; first += kChannelsTogether) {
    const int64_t together = std::min(kChannelsTogether, channels_ - first);
    for (int64_t c = 0; c < together; ++c) {
      gather_floats(kernels, x, from + (first + c) * x.channel_step * x.bytes, step, count, values,
                    rows + c * stride);
    }
    transpose(rows, stride, together, count, [&](int64_t i) { return line_of_inner(i) + first; });
  }
}

}  // namespace dynquant
