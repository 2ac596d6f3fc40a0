#include "../cpu/kernels.h"

namespace dynquant {
constexpr Dtype D = Dtype::f32;
}

#include "quantize_kernels.cuh"
