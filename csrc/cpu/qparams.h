// Scale and zero point from a range of values: the numeric specification's middle part.
#pragma once

#include <math.h>

#include "host_device.h"
#include "kernels.h"

namespace dynquant {
struct QParams {
  float scale;
  float inv;
  int32_t zero_point;
  bool all_zero;  // every q is 0: nothing to quantize, or nothing that could be
};

namespace {

// Symmetric ones have 8 bits.
DYNQUANT_BOTH inline QParams choose_qparams(const Range& range, bool symmetric, int bits = 8) {
  const float amax = -range.lo > range.hi ? -range.lo : range.hi;
  const float span = symmetric ? amax : range.hi - range.lo;
  const float levels = symmetric ? 127.0f : bits == 16 ? 65535.0f : 255.0f;
  if (range.has_nan || !isfinite(span)) return {NAN, 0.0f, 0, true};
  const float inv = levels / span;
  if (!isfinite(inv)) return {1.0f, 0.0f, 0, true};
  float zero_point = 0.0f;
  if (!symmetric) {
    zero_point = rintf(-range.lo * inv);  // one instruction, where nearbyintf is a call
    zero_point = zero_point < 0.0f ? 0.0f : zero_point > levels ? levels : zero_point;
  }
  return {span / levels, inv, static_cast<int32_t>(zero_point), false};
}

// How a row's values become bytes under these parameters. An all-zero row is clamped to zero, which
// holds for NaN as well. `staged` asks for unsigned bytes: signed ones are shifted by 128.
DYNQUANT_BOTH inline QuantizeArgs quantize_args(const QParams& p, bool symmetric, bool staged,
                                                int bits = 8) {
  QuantizeArgs a = {};
  a.factor = p.inv;
  a.zero_point = p.zero_point;
  a.q_min = p.all_zero ? 0 : symmetric ? -127 : 0;
  a.q_max = p.all_zero ? 0 : symmetric ? 127 : bits == 16 ? 65535 : 255;
  a.shift = symmetric && staged ? 128 : 0;
  return a;
}

}  // namespace
}  // namespace dynquant
