// The windows that a convolution over one dimension sees, as rows of a product.
#pragma once

#include "pieces.h"
#include "tensors.h"

namespace dynquant {

// Window t has the positions t * stride + tap * dilation - left of a sequence for each tap; those
// outside of it are zeros.
struct Windows {
  int64_t taps;
  int64_t stride;
  int64_t left;
  int64_t right;
  int64_t dilation;

  // Positions from the first to the last of so many windows.
  int64_t span(int64_t windows) const { return (windows - 1) * stride + (taps - 1) * dilation + 1; }
  // How many windows a sequence has.
  int64_t count(int64_t length) const { return (length + left + right - span(1)) / stride + 1; }
};

// x[B, C, L] with any strides.
struct Sequences {
  explicit Sequences(const Tensor& x);

  Tensor holder;
  const char* data;
  Dtype dtype;
  int64_t bytes;  // of a value
  int64_t batch, channels, length;
  int64_t batch_step, channel_step, position_step;  // in values
};

// Some windows of a sequence in fp32: lines of the channels of one position, such that the lines of
// each window lie one behind the other. Lines that windows share are there once where that takes
// less memory: then those `dilation` apart are neighbours.
class WindowLines {
 public:
  WindowLines(const Windows& windows, int64_t channels, int64_t count);
  // Fewer windows, as lines in the same way: they need no more memory.
  WindowLines of(int64_t count) const;

  int64_t count() const { return count_; }
  int64_t lines() const { return runs_ * lines_of_run_; }
  // Of the window's first line.
  int64_t first(int64_t window) const {
    return shared_ ? line_of(window * windows_.stride) : window * lines_of_run_;
  }
  // What `lay` needs beside the lines.
  int64_t bytes_beside() const;
  // The windows from that number `first` on of a sequence and channels from `channel` on, as lines
  // at `out`.
  void lay(const Kernels& kernels, const Sequences& x, int64_t sequence, int64_t channel,
           int64_t first, float* out, uint8_t* beside) const;

 private:
  WindowLines(const Windows& windows, int64_t channels, int64_t count, bool shared);

  // Where windows share lines: that of a position of theirs.
  int64_t line_of(int64_t position) const {
    if (step_ == 1) return position;
    return position % step_ * lines_of_run_ + position / step_;
  }
  // `count` positions of a sequence, `step` apart, of which some may lie outside.
  struct Run {
    const char* sequence;
    int64_t position, count, step;
  };
  template <class LineAt>
  void lay_run(const Kernels& kernels, const Sequences& x, const Run& run, const LineAt& line_at,
               uint8_t* beside) const;

  const Windows windows_;
  const int64_t channels_, count_;
  const int64_t step_;
  const bool shared_;
  const int64_t runs_, lines_of_run_;
};

}  // namespace dynquant
