// conv1d_dynamic: windows as rows of a product, in blocks that stay in the L2 cache.
#include <limits>
#include <numeric>

#include "gemm_driver.h"
#include "ops.h"
#include "product_of_groups.h"
#include "transposed.h"
#include "windows.h"

namespace dynquant {
namespace {

// Windows of one sequence, quantized as they are staged.
struct WindowRows {
  const Kernels& kernels;
  const ActivationScheme& scheme;
  const std::optional<QParams>& whole;
  const WindowLines& lines;
  int64_t taps;
  int64_t channels;
  const float* values;
  const Range* ranges;  // of each line, or null

  int64_t bytes() const { return scheme.bits / 8; }

  StagedRow stage(const Product& product, int64_t window, uint8_t* staged, uint8_t* low) const {
    const int64_t first = lines.first(window), k = taps * channels;
    const float* x = values + first * channels;
    const QParams p = whole.has_value() ? *whole : scheme.choose(range(first, x, k));
    return stage_floats(product, x, Dtype::f32, k, p, scheme.symmetric, scheme.bits, staged, low);
  }

 private:
  Range range(int64_t first, const float* x, int64_t k) const {
    if (ranges == nullptr) return kernels.range(x, Dtype::f32, k);
    Range all = ranges[first];
    for (int64_t tap = 1; tap < taps; ++tap) all = merge(all, ranges[first + tap]);
    return all;
  }
};

class Conv1d {
 public:
  Conv1d(Sequences x, ProductOfGroups product, const Windows& windows,
         const ActivationScheme& scheme)
      : kernels_(kernels_in_use()),
        x_(std::move(x)),
        product_(std::move(product)),
        windows_(windows),
        scheme_(scheme),
        channels_(x_.channels / product_.groups()),
        windows_of_sequence_(windows.count(x_.length)) {}

  Tensor run() {
    Tensor y = empty({x_.batch, product_.n(), windows_of_sequence_}, x_.holder.scalar_type());
    out_ = static_cast<char*>(y.mutable_data_ptr());
    const int64_t bytes = scheme_.bits / 8, rows = x_.batch * windows_of_sequence_ * bytes;
    if (rows == 0 || product_.n() == 0) return y;
    if (!scheme_.per_token) {  // else rows_of may copy x for nothing
      whole_ = scheme_.whole(kernels_, rows_of(x_.holder, "x"), x_.dtype);
    }
    const int64_t groups = product_.groups(), columns = product_.columns(), k = product_.k();
    const Product& product = product_for(kernels_, rows, columns, k);
    const int64_t multiple = std::max(product.row_multiple, bytes);
    const double each = product_nanoseconds(rows, columns, k, product.costs);
    const int64_t threads = num_threads();
    const double region = region_nanoseconds(Threads::kPool, threads);
    // As many parts of each group as let every thread have as many of all.
    const Split split = choose_split(rows, columns, k, threads / std::gcd(threads, groups),
                                     product.costs, multiple);
    const int64_t parts = groups * split.parts();
    const int64_t tasks = static_cast<double>(groups) * each > region ? parts : 1;
    const int64_t row_bytes =
        staged_stride(product.layout, groups_of(k)) +
        (std::min(windows_.stride, windows_.taps) * channels_ + columns) * 4 / bytes;
    run_tasks(tasks, [&](int64_t task) {
      for (int64_t i = parts * task / tasks; i < parts * (task + 1) / tasks; ++i) {
        const int64_t group = i / split.parts();
        const Part part = part_of(split, i % split.parts(), rows, columns);
        if (part.is_empty()) continue;
        for_each_block(
            product, part.m_end - part.m_begin, row_bytes, multiple, [&](int64_t b, int64_t e) {
              const int64_t begin = (part.m_begin + b) / bytes, end = (part.m_begin + e) / bytes;
              run_block(product, group, begin, end, part.n_begin, part.n_end);
            });
      }
    });
    return y;
  }

 private:
  // A group's columns [n_begin, n_end) of the windows [begin, end) of all sequences.
  void run_block(const Product& product, int64_t group, int64_t begin, int64_t end, int64_t n_begin,
                 int64_t n_end) const {
    const int64_t bytes = scheme_.bits / 8, rows = end - begin;
    const WindowLines most(windows_, channels_, std::min(rows, windows_of_sequence_));
    const int64_t values = most.lines() * channels_, results = rows * stride_of_sums();
    const int64_t turned_results = x_.dtype == Dtype::f32 ? 0 : results;
    const int64_t ranges = most.lines() * static_cast<int64_t>(sizeof(Range));
    Pieces pieces(Purpose::block,
                  {values * 4, ranges, most.bytes_beside(), results * 4, turned_results * 4});
    const Memory memory = {pieces.next<float>(values), pieces.next<Range>(most.lines()),
                           pieces.next<uint8_t>(most.bytes_beside())};
    float* sums = pieces.next<float>(results);
    float* turned = pieces.next<float>(turned_results);

    const StagedRows staged(product, product_.k(), rows * bytes, bytes, Purpose::staged_rows);
    for_each_sequence(begin, end, [&](int64_t sequence, int64_t first, int64_t at, int64_t count) {
      stage(staged, most.of(count), {sequence, group, first}, at, memory);
    });
    const Packed& weight = product_.weight(group);
    const bool is_far = reads_far(rows * bytes, weight.panels, weight.n * weight.k);
    staged.multiply(0, rows * bytes, weight, n_begin, n_end,
                    product_.to(group, sums, stride_of_sums()), is_far);
    for_each_sequence(begin, end, [&](int64_t sequence, int64_t first, int64_t at, int64_t count) {
      finish(sums + at * stride_of_sums(), {sequence, group, first}, count, n_begin, n_end, turned);
    });
  }

  // f(sequence, first window of it, which row of the block that is, how many windows).
  template <class F>
  void for_each_sequence(int64_t begin, int64_t end, const F& f) const {
    for (int64_t row = begin; row < end;) {
      const int64_t first = row % windows_of_sequence_;
      const int64_t count = std::min(end - row, windows_of_sequence_ - first);
      f(row / windows_of_sequence_, first, row - begin, count);
      row += count;
    }
  }

  // A power of two would bring the values of a column into few cache sets.
  int64_t stride_of_sums() const { return product_.columns() + 16; }

  struct Place {
    int64_t sequence, group;
    int64_t window;  // of the sequence
  };

  struct Memory {
    float* values;
    Range* ranges;
    uint8_t* beside;
  };

  // The windows from that place on become staged rows from `at` on.
  void stage(const StagedRows& staged, const WindowLines& lines, const Place& place, int64_t at,
             const Memory& memory) const {
    const int64_t channel = place.group * channels_;
    lines.lay(kernels_, x_, place.sequence, channel, place.window, memory.values, memory.beside);
    // Shorter lines take longer apart than all of a window together.
    constexpr int64_t kLeastChannels = 8;
    const bool apart = scheme_.per_token && channels_ >= kLeastChannels;
    for (int64_t line = 0; apart && line < lines.lines(); ++line) {
      memory.ranges[line] = kernels_.range(memory.values + line * channels_, Dtype::f32, channels_);
    }
    const WindowRows source = {
        kernels_,      scheme_,   whole_,        lines,
        windows_.taps, channels_, memory.values, apart ? memory.ranges : nullptr};
    const int64_t bytes = scheme_.bits / 8;
    staged.stage(source, 0, at * bytes, (at + lines.count()) * bytes);
  }

  // Results of `count` windows, a row for each, become channels of the output.
  void finish(const float* sums, const Place& place, int64_t count, int64_t n_begin, int64_t n_end,
              float* turned) const {
    const int64_t columns = n_end - n_begin, length = windows_of_sequence_;
    const int64_t channel =
        place.sequence * product_.n() + place.group * product_.columns() + n_begin;
    char* out = out_ + (channel * length + place.window) * x_.bytes;
    if (x_.dtype == Dtype::f32) {
      float* channels = reinterpret_cast<float*>(out);
      return transpose(sums + n_begin, stride_of_sums(), count, columns,
                       [&](int64_t c) { return channels + c * length; });
    }
    transpose(sums + n_begin, stride_of_sums(), count, columns,
              [&](int64_t c) { return turned + c * count; });
    for (int64_t c = 0; c < columns; ++c) {
      kernels_.narrow(turned + c * count, count, x_.dtype, out + c * length * x_.bytes);
    }
  }

  const Kernels& kernels_;
  const Sequences x_;
  const ProductOfGroups product_;
  const Windows windows_;
  const ActivationScheme scheme_;
  const int64_t channels_;  // of a group
  const int64_t windows_of_sequence_;
  std::optional<QParams> whole_;
  char* out_ = nullptr;
};

// Numbers within which no position overflows.
int64_t checked(const char* name, int64_t given, int64_t least) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(given >= least && given <= kMost, name, " must lie in [", least, ", ", kMost, "], got ",
        given);
  return given;
}

}  // namespace

Tensor conv1d_dynamic(const Tensor& x, const Tensor& packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, int64_t kernel_size, int64_t stride,
                      int64_t padding_left, int64_t padding_right, int64_t dilation, bool per_token,
                      bool symmetric, int64_t activation_bits) {
  const ActivationScheme scheme(per_token, symmetric, activation_bits, "activation_bits");
  Sequences sequences(x);
  const Windows windows = {checked("kernel_size", kernel_size, 1), checked("stride", stride, 1),
                           checked("padding_left", padding_left, 0),
                           checked("padding_right", padding_right, 0),
                           checked("dilation", dilation, 1)};
  ProductOfGroups product(packed, weight_scale, bias);
  const int64_t groups = product.groups(), channels = sequences.channels / groups;
  const std::string each = groups == 1 ? "" : " in each of " + std::to_string(groups) + " groups";
  check(channels > 0 && channels * groups == sequences.channels && product.k() % channels == 0 &&
            product.k() / channels == kernel_size,
        "x must have K / kernel_size channels", each, ", K = ", product.k(),
        " as the packed weight has, got ", ShapeOf(x), " and kernel_size = ", kernel_size);
  constexpr int64_t kLongest = std::numeric_limits<int64_t>::max() / 2;
  check(sequences.length <= kLongest, "x must have L of at most ", kLongest, ", got ", ShapeOf(x));
  const int64_t padded = sequences.length + padding_left + padding_right;
  check(windows.span(1) <= padded, "x must not be shorter, with its padding, than the kernel, ",
        windows.span(1), " positions, got ", padded);
  return Conv1d(std::move(sequences), std::move(product), windows, scheme).run();
}

}  // namespace dynquant
