#include "../cpu/kernels.h"

namespace dynquant {
constexpr Dtype D = Dtype::bf16;
}

#include "quantize_kernels.cuh"
