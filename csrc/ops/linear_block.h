// linear_block, for ops that have it as a part.
#pragma once

#include "block.h"

namespace dynquant {

// norm_after(residual + activation(linear(norm_before(x)))); the ends are those of `linear`.
Tensor linear_block(const Tensor& x, Int8Product linear, int64_t activation, BlockEnds ends);

}  // namespace dynquant
