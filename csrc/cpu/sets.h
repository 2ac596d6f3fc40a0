// One factory for each instruction set's file.
#pragma once

#include "kernels.h"

namespace dynquant {

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_ymm_kernels();
const Kernels* avx512vnni_kernels();

}  // namespace dynquant
