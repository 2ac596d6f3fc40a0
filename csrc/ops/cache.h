// How much a block of rows may take.
#pragma once

#include <stdint.h>

namespace dynquant {

// Half of one core's L2 cache: the other half is for the weights that stream past.
int64_t half_of_l2();

}  // namespace dynquant
