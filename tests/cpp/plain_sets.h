// Sets in plain C++ of odd widths and tiles that no processor has: lanes x rows of a tile x
// registers. Each has a file of its own, since they take long to compile.
#pragma once

#include "kernels.h"

namespace dynquant {

const Kernels* plain_1x3x7();
const Kernels* plain_2x5x9();
const Kernels* plain_4x7x40();

// The tiles' product over plain vectors, where no processor has to offer anything.
const Product* plain_tiles();

}  // namespace dynquant
