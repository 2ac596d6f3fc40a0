#include "../cpu/kernels.h"

namespace dynquant {
constexpr Dtype D = Dtype::f16;
}

#include "quantize_kernels.cuh"
